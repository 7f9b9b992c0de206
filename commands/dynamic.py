"""`dataflex dynamic`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex.commands import session as s
from dataflex.commands.console import Console
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex dynamic examples/demo.yaml --dry-run"
MOST_SHOWN = 12  # selections in the closing table; all of them are in run.json


def dynamic(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    eval_dataset: s.EvalDataset = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    gradient_type: s.GradientType = None,
    adam_formula: s.AdamFormula = None,
    proj_dim: s.ProjDim = None,
    projector: s.Projector = None,
    token_budget: s.TokenBudget = None,
    output_dir: s.OutputDir = None,
    skip_bad_rows: s.SkipBadRows = False,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Fine-tune on random rows first, then on selected ones.

    Every update_step optimizer steps the rows that help the validation data most are picked anew; each
    selection is kept in output_dir/selections.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="dynamic", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "dynamic", launches=True, nproc=nproc)
        import dataflex

        folder = dataflex.dynamic(session.config, session.console)
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        _show(session.console, folder, run)
        session.next("eval", s.CONFIG, "--adapter", folder, "-o", folder / "eval.json")
        facts = {key: value for key, value in run.items() if key != "losses_of_others"}  # a value a row
        session.console.result([folder], {"command": "dynamic", "output_dir": str(folder), **facts})


def _show(console: Console, folder: Path, run: dict[str, Any]) -> None:
    """The closing tables: what was picked, what it did, where it is."""
    pool, made = run["pool"], run["selections"]
    rows = [["the pool", run["rows"], *[_share(count, run["rows"]) for count in pool.values()]]]
    for one in made if len(made) <= MOST_SHOWN else [*made[: MOST_SHOWN - 1], made[-1]]:
        rows.append(
            [f"picked at step {one['step']}", one["rows"], *[_share(one["picked"][name], one["rows"]) for name in pool]]
        )
    if len(made) > MOST_SHOWN:
        rows.insert(-1, [f"… {len(made) - MOST_SHOWN} more", "", *["" for _ in pool]])
    console.table("What was picked", ["", "rows", *pool], rows)
    console.facts(
        "The run",
        {
            "optimizer steps": f"{run['steps']}, {run['rows_per_step']} rows each",
            "selections": f"{len(made)}, listed in {folder}/selections/",
            f"loss on {run['eval_rows']} eval rows": "{before:.4f} before, {after:.4f} after".format(
                **run["eval_loss"]
            ),
            "seconds": ", ".join(f"{name} {value:.0f}" for name, value in run["seconds"].items()),
            "adapter, logs, checkpoints": f"{folder}/",
            **({"page": f"{folder}/report.html"} if (folder / "report.html").is_file() else {}),
        },
    )


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f}%)"
