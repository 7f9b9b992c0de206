"""`dataflex select`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan
from dataflex.commands.summaries import show_best, show_scores, show_subset
from dataflex.config import help_of, needed

EXAMPLE = "Example: dataflex select --scores saves/scores.jsonl --data alpaca_en_demo --top 0.05 -o saves/subset.jsonl"


def select(
    arguments: s.Arguments = None,
    scores: Annotated[str | None, s.option("scores", "--scores")] = None,
    data: Annotated[str | None, s.option("data", "--data")] = None,
    dataset_dir: s.DatasetDir = None,
    top: Annotated[str | None, s.option("top", "--top")] = None,
    count: Annotated[int | None, s.option("count", "--count")] = None,
    threshold: Annotated[float | None, s.option("threshold", "--threshold")] = None,
    plain: Annotated[bool, typer.Option("--plain", help=help_of("plain"))] = False,
    output: s.Output = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Write the best-scored rows of a dataset as JSONL, best first.

    Any trainer that reads the dataset's format reads the file. Give one of --top, --count and --threshold.
    """
    options = s.given(locals())
    with s.session(arguments, options, as_json=as_json, quiet=quiet, command="select") as session:
        if dry_run:
            return show_plan(session, "select")
        from dataflex.influence.selection import write_subset

        subset, path = write_subset(session.config, session.console), Path(needed(session.config.output))
        chosen, scored = subset.chosen.tolist(), subset.scores
        show_scores(session.console, f"selected {len(chosen)} of {len(scored.row)} rows", scored, chosen)
        if session.config.plain:
            show_best(session.console, scored, chosen)
        elif not session.console.quiet:
            titles = "the best rows", "the last rows that were selected"
            show_subset(session.console, path, map(json.loads, subset.lines), titles)
        session.next("train", s.CONFIG, "--dataset", path, "-o", "saves/selected")
        session.console.result([path], {"command": "select", "output": str(path), "rows": len(chosen)})
