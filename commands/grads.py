"""`dataflex grads`"""

from __future__ import annotations

from typing import Annotated

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex grads examples/pipeline.yaml --checkpoint saves/warmup/checkpoint-8 -o saves/train.h5"

Split = Annotated[str | None, s.option("split", "--split")]


def grads(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    eval_dataset: s.EvalDataset = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    checkpoint: s.Checkpoints = None,
    split: Split = None,
    gradient_type: s.GradientType = None,
    adam_formula: s.AdamFormula = None,
    proj_dim: s.ProjDim = None,
    projector: s.Projector = None,
    store_dtype: Annotated[str | None, s.option("store_dtype", "--store-dtype")] = None,
    token_budget: s.TokenBudget = None,
    output: s.Output = None,
    skip_bad_rows: s.SkipBadRows = False,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Collect every row's projected gradient in an HDF5 store.

    Training rows give the step Adam would take on them; with --split eval, validation rows give their gradient.
    Run again after an interruption, it computes only the rows that are missing.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="grads", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "grads", launches=True, nproc=nproc)
        import dataflex
        from dataflex.config import needed

        path = dataflex.grads(session.config, session.console)
        with dataflex.open_store(path) as store:
            facts = {
                "rows": len(store),
                "dimensions": store.dim,
                "skipped": int(store.bad.sum()),
                "mean_loss": float(store.loss[~store.bad].mean()),
                "checkpoint_step": store.manifest["step"],
                "direction": store.manifest["gradient_type"],
                "bytes": path.stat().st_size,
            }
        session.console.facts(str(path), {key.replace("_", " "): value for key, value in facts.items()})
        if session.config.split == "train":
            taken_at = needed(session.config.checkpoint)[0]
            further = ["--checkpoint", taken_at, "--split", "eval", "-o", path.with_name("eval.h5")]
            session.next("grads", s.CONFIG, *further)
        else:
            stores = ["--train", path.with_name("train.h5"), "--eval", path]
            session.next("score", *stores, "-o", path.with_name("scores.jsonl"))
        session.console.result([path], {"command": "grads", "output": str(path), **facts})
