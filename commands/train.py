"""`dataflex train`"""

from __future__ import annotations

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex train examples/pipeline.yaml --dataset saves/subset.jsonl -o saves/selected"


def train(
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
    """Train a LoRA adapter on all of a dataset, such as a subset."""
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="train", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "train", launches=True, nproc=nproc)
        import dataflex

        folder = dataflex.train(session.config, session.console)
        session.next("eval", s.CONFIG, "--adapter", folder, "-o", folder / "eval.json")
        session.console.result([folder], {"command": "train", "output_dir": str(folder)})
