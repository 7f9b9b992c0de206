"""The score file: a line a row as JSON, in row order."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.errors import UsageError
from dataflex.files import read_jsonl, write_jsonl
from dataflex.influence.scores import Scores

MAX_ROW = (1 << 63) - 1
LARGEST = sys.float_info.max
"""The largest score: JSON holds integers of any size."""


def score_records(scores: Scores, indices: Iterable[int]) -> Iterable[dict[str, object]]:
    """The lines of a score file for `indices`, in that order."""
    for index in indices:
        record: dict[str, object] = {"row": int(scores.row[index])}
        if scores.dataset is not None:
            record["dataset"] = scores.dataset[index]
        record["score"] = float(scores.score[index])
        record["subtasks"] = {name: float(values[index]) for name, values in scores.subtasks.items()}
        yield record


def write_scores(scores: Scores, path: Path) -> None:
    """Write a score file in row order, without the bad rows; atomic."""
    order = np.argsort(scores.row, kind="stable")
    write_jsonl(path, score_records(scores, order[np.isfinite(scores.score[order])].tolist()))


def read_scores(path: str | Path) -> Scores:
    """Read a score file. A row that lacks a subtask which another row has gets NaN for it.

    Raises:
        UsageError: naming the first line that is not a score, or a row that stands twice.
    """
    rows, values = array("q"), array("d")
    subtasks: dict[str, array[float]] = {}
    names: dict[str, int] = {}
    named = array("i")  # of each row, the position of its dataset in `names`
    for number, record in enumerate(read_jsonl(path, "scores"), start=1):
        row, score = record.get("row"), record.get("score")
        of_subtasks = record.get("subtasks") or {}
        if (
            type(row) is not int
            or not 0 <= row <= MAX_ROW
            or not isinstance(of_subtasks, dict)
            or not _is_finite(score)
            or not all(map(_is_finite, of_subtasks.values()))
        ):
            raise UsageError(
                f'scores {path}, record {number}: expected {{"row": 17, "score": 0.01}}, and numbers by name under '
                f'"subtasks" where there are any; found {str(record)[:80]}'
            )
        rows.append(row)
        values.append(float(record["score"]))
        for name, value in of_subtasks.items():
            column = subtasks.get(name)
            if column is None:
                column = subtasks[name] = array("d")
            if len(column) < number - 1:
                column.extend([math.nan] * (number - 1 - len(column)))
            column.append(value)
        if record.get("dataset") is not None:
            named.append(names.setdefault(str(record["dataset"]), len(names)))
    if not rows:
        raise UsageError(f"scores {path}: no scores in it")
    row = np.array(rows)
    order = np.argsort(row, kind="stable")
    twice = order[1:][row[order[1:]] == row[order[:-1]]]
    if len(twice):
        first = twice.min()
        raise UsageError(f"scores {path}, record {first + 1}: row {row[first]} stands twice")
    in_order = list(names)
    dataset = [in_order[position] for position in named] if len(named) == len(rows) else None
    for column in subtasks.values():
        column.extend([math.nan] * (len(rows) - len(column)))
    return Scores(row, np.array(values), {name: np.array(column) for name, column in subtasks.items()}, dataset)


def _is_finite(value: Any) -> bool:
    """Whether a value from a file is a finite number."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST
