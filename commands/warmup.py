"""`dataflex warmup`"""

from __future__ import annotations

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex warmup examples/pipeline.yaml output_dir=saves/warmup"


def warmup(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    output_dir: s.OutputDir = None,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Train a LoRA adapter on random rows for warmup_step steps.

    Writes checkpoints with the adapter and Adam's moments, the place where gradients are then taken.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="warmup", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "warmup", launches=True, nproc=nproc)
        import dataflex

        checkpoint = dataflex.warmup(session.config, session.console)
        session.next("grads", s.CONFIG, "--checkpoint", checkpoint, "-o", checkpoint.parent / "train.h5")
        session.console.result([checkpoint], {"command": "warmup", "checkpoint": str(checkpoint)})
