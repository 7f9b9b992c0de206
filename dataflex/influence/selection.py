"""From scores to the rows that are taken: the `select` command and its rules."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config import RunConfig, needed
from dataflex.data.catalog import find_sources
from dataflex.data.subset import subset_records, take_records
from dataflex.errors import UsageError
from dataflex.files import json_lines, sha256_of, write_text
from dataflex.influence.score_file import read_scores
from dataflex.influence.scores import Scores, ranking
from dataflex.influence.sidecar import read_manifest, write_with_manifest
from dataflex.needs import check_needs
from dataflex.planning import Plan
from dataflex.progress import SILENT, Progress


def choose(
    scores: Scores, *, top: float | None = None, count: int | None = None, threshold: float | None = None
) -> np.ndarray:
    """Indices of the selected rows, best first; equal scores in row order.

    Args:
        top: a share of the scored rows, rounded down, at least one row.
        count: a number of rows.
        threshold: every row that scores at least this.

    Raises:
        UsageError: unless exactly one rule is given, and if it selects no row or more than there are.
    """
    if len([rule for rule in (top, count, threshold) if rule is not None]) != 1:
        raise UsageError("select needs one of top (a share such as 0.05), count or threshold")
    order = ranking(scores.row, scores.score)
    if threshold is not None:
        order = order[scores.score[order] >= threshold]
        if not len(order):
            raise UsageError(f"no row scores {threshold} or more; the best scores {scores.score.max():.6g}")
        return order
    wanted = count if top is None else max(1, int(round(top * len(order), 9)))
    if wanted is None:
        raise TypeError("one of the rules is given")
    if wanted > len(order):
        raise UsageError(f"count {wanted} is more than the {len(order)} scored rows; lower it")
    return order[:wanted]


@dataclass(frozen=True)
class Subset:
    """Records that are ready to be written."""

    lines: list[str]
    """A record each, best first."""
    scores: Scores
    """Of all rows that had a score."""
    chosen: np.ndarray
    """The indices of the records among `scores`."""
    came_from: dict[str, Any]


def select(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Write the best rows of `data`, as they stand in their source, into the subset `output`; return its path."""
    write_subset(config, progress)
    return Path(needed(config.output))


def write_subset(config: RunConfig, progress: Progress = SILENT) -> Subset:
    """`select`, for who wants to know what was selected."""
    subset = prepare_select(config, Plan("select"), progress)
    path, lines = Path(needed(config.output)), subset.lines
    write_with_manifest(path, lambda: write_text(path, "".join(lines)), len(lines), subset.came_from)
    taken = subset.scores.score[subset.chosen]
    progress.say(
        f"{len(lines)} of {len(subset.scores.row)} scored rows selected, scores {taken[-1]:.4g} to {taken[0]:.4g}"
    )
    return subset


def prepare_select(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Subset:
    """Find out and check everything that `select` needs, and choose the rows; nothing is written."""
    check_needs(config, "select")
    names = config.data or needed(config.dataset)
    scores = read_scores(needed(config.scores))
    chosen = choose(scores, top=config.top, count=config.count, threshold=config.threshold)

    sources = find_sources(names, config.dataset_dir)
    manifest = read_manifest(Path(needed(config.scores)), len(scores.row), progress)
    rows = [int(scores.row[index]) for index in chosen]
    digest = hashlib.sha256()
    taken, total = take_records(sources, rows, digest, expected=int(scores.row.max()) + 1, progress=progress)
    files = digest.hexdigest()
    if manifest is not None and manifest.get("files") not in (None, files):
        raise UsageError(
            f"scores {config.scores} were made from other data than {', '.join(names)}: its files had the hash "
            f"{str(manifest['files'])[:12]}, these have {files[:12]}; name the data as it was scored, or score it again"
        )
    if scores.row.max() >= total:
        raise UsageError(
            f"scores {config.scores}: row {scores.row.max()} is past the end of {', '.join(names)} ({total} rows); "
            "name the data the scores were made from"
        )
    records = subset_records([taken[row] for row in rows], rows)
    if not config.plain:
        for record, index in zip(records, chosen, strict=True):
            record["dataflex"] = {"row": int(scores.row[index]), "score": float(scores.score[index])}
    came_from = {
        "command": "select",
        **{rule: getattr(config, rule) for rule in ("top", "count", "threshold")},
        "files": files,
        "scores": manifest or {"sha256": sha256_of(needed(config.scores))},
    }
    return Subset(list(json_lines(needed(config.output), records)), scores, chosen, came_from)
