"""The `report` command: report.html and report.json from what a run, a comparison or a scoring left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex.config import RunConfig
from dataflex.errors import UsageError
from dataflex.files import write_json, write_text
from dataflex.progress import SILENT, Progress
from dataflex.reporting.facts import facts_of_comparison, facts_of_run, facts_of_scores, finished_record
from dataflex.reporting.page import page_of
from dataflex.reporting.verdicts import verdict_of_runs

PAGE = "report.html"


def report(
    config: RunConfig, target: str | Path, against: str | Path | None = None, progress: Progress = SILENT
) -> Path:
    """Write the page of `target` and its numbers beside it; return the page's path.

    Args:
        target: the folder of a finished `dynamic` or `compare`, or a score file. The page of a score file FILE.jsonl is
            FILE.report.html, and `data` or `dataset` names the rows that it scores.
        against: the folder of another `dynamic`, whose loss is put beside that of `target`.
    """
    facts = facts_of(config, target, against, progress)
    path = Path(target)
    page = path / PAGE if path.is_dir() else path.with_suffix(f".{PAGE}")
    write_text(page, page_of(facts))
    write_json(page.with_suffix(".json"), facts)
    return page


def facts_of(config: RunConfig, target: str | Path, against: str | Path | None, progress: Progress) -> dict[str, Any]:
    """The numbers of report.json; nothing is written."""
    path = Path(target)
    if not path.exists():
        raise UsageError(f"report {path}: no such file or folder; name a folder of dynamic or compare, or a score file")
    command = finished_record(path).facts["command"] if path.is_dir() else "score"
    if command not in ("dynamic", "compare", "score"):
        raise UsageError(f"{path} is a run of {command}; a report is made of dynamic and compare")
    if against is not None and command != "dynamic":
        raise UsageError(f"{path} is of {command}; --against compares two runs of dynamic")
    if command == "score":
        return facts_of_scores(path, config, progress)
    if command == "compare":
        return facts_of_comparison(path)
    facts = facts_of_run(path, progress)
    return facts if against is None else _with_verdict(facts, Path(against), progress)


def _with_verdict(facts: dict[str, Any], against: Path, progress: Progress) -> dict[str, Any]:
    """`facts` with the losses of another run beside them, and a line that says which is lower."""
    command = finished_record(against).facts["command"]
    if command != "dynamic":
        raise UsageError(f"--against {against}: a run of {command}; expected one of dynamic")
    other = facts_of_run(against, progress)
    for what in ("eval_dataset", "base_model"):
        if facts["fingerprints"][what] != other["fingerprints"][what]:
            raise UsageError(f"{facts['name']} and {against} differ in {what}; their losses cannot be compared")
    kept = {key: other[key] for key in ("name", "selector", "eval_loss", "others", "seconds")}
    return {**facts, "against": kept, "verdict": verdict_of_runs(facts, other)}
