"""Every row's score at a selection, as a table in a Parquet file: for reports and for whoever wants to look."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataflex.files import atomic
from dataflex.influence.scores import Scores

SUBTASK = "subtask "
"""What a column of a subtask's scores begins with; its name follows."""


def write_score_table(path: Path, scores: Scores, tokens: np.ndarray) -> None:
    """Write the columns row, dataset (where several were named), score (null where a row has none), tokens (supervised)
    and one for each subtask; atomic."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, pyarrow.Array] = {"row": pyarrow.array(scores.row)}
    if scores.dataset is not None:
        columns["dataset"] = pyarrow.array(scores.dataset).dictionary_encode()
    columns["score"] = pyarrow.array(scores.score, from_pandas=True)  # NaN is null
    columns["tokens"] = pyarrow.array(tokens, type=pyarrow.int32())
    for name, values in scores.subtasks.items():
        columns[SUBTASK + name] = pyarrow.array(values, from_pandas=True)
    with atomic(path, "wb") as handle:
        parquet.write_table(pyarrow.table(columns), handle)


def read_score_table(path: Path) -> tuple[Scores, np.ndarray]:
    """What `write_score_table` wrote: the scores, and the supervised tokens [N]."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    numbers = {name: table[name].to_numpy() for name in table.column_names if name != "dataset"}
    subtasks = {name.removeprefix(SUBTASK): column for name, column in numbers.items() if name.startswith(SUBTASK)}
    dataset = table["dataset"].to_pylist() if "dataset" in table.column_names else None
    return Scores(numbers["row"], numbers["score"], subtasks, dataset), numbers["tokens"]
