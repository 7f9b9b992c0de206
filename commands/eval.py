"""`dataflex eval`"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex eval run.yaml --adapter saves/less --dataset held_out.jsonl -o eval.json"

HeldOut = Annotated[str | None, s.option("held_out", "--dataset", "--held-out")]


def eval(
    arguments: s.Arguments = None,
    model: s.Model = None,
    adapter: Annotated[list[str] | None, s.option("adapter_name_or_path", "--adapter")] = None,
    held_out: HeldOut = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    token_budget: s.TokenBudget = None,
    output: s.Output = None,
    max_new_tokens: Annotated[int | None, s.option("max_new_tokens", "--max-new-tokens")] = None,
    rows: Annotated[str | None, s.option("rows", "--rows")] = None,
    allow_overlap: s.AllowOverlap = False,
    export: Annotated[str | None, s.option("export", "--export")] = None,
    tasks: Annotated[list[str] | None, s.option("tasks", "--tasks")] = None,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Measure a model on held-out rows: loss, perplexity, answers.

    Run again after an interruption, it computes only the rows that are missing.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="eval", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "eval", launches=True, nproc=nproc)
        import dataflex
        from dataflex.evaluation.dataflow import export_paths
        from dataflex.evaluation.lm_eval import metrics_of

        path = dataflex.evaluate(session.config, session.console)
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [(Path(name).name, part) for name, part in found["datasets"].items()]
        parts += [(f"subtask {name}", part) for name, part in found["subtasks"].items()]
        columns = ["rows", "tokens", "loss", "token_loss", "perplexity"]
        columns += [key for key in ("exact", "normalised", "math") if key in found]
        table = [[name, *[part[key] for key in columns]] for name, part in [*parts, ("all", found)]]
        session.console.table("held-out rows", ["", *[key.replace("_", " ") for key in columns]], table)
        written = [path, Path(session.config.rows)] if session.config.rows else [path]
        if session.config.export == "dataflow":
            written += export_paths(session.config)
            session.console.next(f"cd {shlex.quote(str(written[-1].parent))} && dataflow eval local")
        if measured := (found.get("lm_eval") or {}).get("tasks"):
            session.console.table("lm-eval", ["task", "metric", "value"], metrics_of(measured))
        session.console.result(written, {"command": "eval", "output": str(path), **found})
