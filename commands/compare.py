"""`dataflex compare`"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dataflex.commands import session as s
from dataflex.commands.console import Console
from dataflex.commands.planned import show_plan
from dataflex.config import help_of

EXAMPLE = (
    "Example: dataflex compare run.yaml --selectors less,bm25,rds --budget 0.05 --seeds 3 --held-out held_out.jsonl "
    "-o saves/compared"
)


def compare(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    eval_dataset: s.EvalDataset = None,
    held_out: Annotated[str | None, s.option("held_out", "--held-out")] = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    selectors: Annotated[str | None, s.option("selectors", "--selectors")] = None,
    budget: Annotated[str | None, s.option("budget", "--budget", "--budgets")] = None,
    by: Annotated[str | None, s.option("by", "--by")] = None,
    seeds: Annotated[int | None, s.option("seeds", "--seeds")] = None,
    deciles: Annotated[bool, typer.Option("--deciles", help=help_of("deciles"))] = False,
    lds: Annotated[int | None, s.option("lds", "--lds")] = None,
    allow_overlap: s.AllowOverlap = False,
    output: s.Output = None,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Say whose rows help held-out rows: selectors' or random ones.

    Every arm starts from the same weights and trains for num_train_epochs passes over its rows. Run again, with
    further selectors, budgets or seeds as well, it makes only what is not there yet.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="compare", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "compare", launches=True, nproc=nproc)
        import dataflex

        folder = dataflex.compare(session.config, session.console)
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        show_comparison(session.console, found)
        if session.config.report:
            session.console.say(f"the page: {folder / 'report.html'}")
        session.console.result([folder], {"output": str(folder), **found})


def show_comparison(console: Console, found: dict[str, Any]) -> None:
    """The closing tables, one a budget."""
    seeds = f"seed{'s' if len(found['seeds']) > 1 else ''} {', '.join(map(str, found['seeds']))}"
    measured = f"loss on {found['held_out']['rows']} held-out rows, {seeds}"
    for budget in found["budgets"]:
        rows = [
            [
                one["arm"],
                f"{one['loss']:.4f}",
                f"{one['difference']:+.4f}" if "difference" in one else "",
                f"{one['low']:+.4f} to {one['high']:+.4f}" if "difference" in one else "",
                _verdict(one),
            ]
            for one in found["summary"]
            if one["budget"] == budget
        ]
        title = f"budget {budget:g} of the {found['by']}: {measured}"
        console.table(title, ["arm", "loss", "against\nrandom", "95% interval", ""], rows)
    console.say(found["verdict"])
    for name, test in found.get("deciles", {}).items():
        console.facts(
            f"tenths of the ranking by {name}, best first",
            {"held-out loss": test["loss"], "Spearman of place and loss": test["spearman"]},
        )
    if "lds" in found:
        console.facts("linear datamodeling score, by seed", found["lds"])


def _verdict(one: dict[str, Any]) -> str:
    if "difference" not in one:
        return ""
    if one["high"] < 0:
        return "better"
    return "worse" if one["low"] > 0 else "not told apart"
