"""What a selection costs beside the model: every path that touches all rows, over a million of them.

    .venv/bin/python examples/benchmarks/many_rows.py --rows 1000000

The rows are random tokens in the Arrow file that encoded rows are kept in; the model is not run. Prints microseconds a
row and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow

from dataflex.data.batches import token_batches
from dataflex.data.rows import (
    Rows,
    dataset_columns,
    largest_tokens,
    lengths_of,
    row_numbers,
    subtasks_of,
    supervised_tokens,
    write_batches,
)
from dataflex.influence.score_table import write_score_table
from dataflex.influence.scores import best_rows, influence, length_correlation, scores_of, settle
from dataflex.store.manifest import Manifest
from dataflex.store.writer import create_store

CHUNK = 10_000
DATASETS = ["first", "second", "third"]


def chunks(rows: int, generator: np.random.Generator) -> Iterator[pyarrow.RecordBatch]:
    """Rows of 8 to 40 random tokens, the second half of each supervised."""
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        lengths = generator.integers(8, 41, count)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = generator.integers(3, 49_000, starts[-1], dtype=np.int32)
        labels = np.where(np.concatenate([np.arange(n) < n // 2 for n in lengths]), -100, tokens).astype(np.int32)
        nothing = pyarrow.array([None] * count, type=pyarrow.string())
        empty = pyarrow.array([[]] * count, type=pyarrow.list_(pyarrow.string()))
        columns = {
            "row": pyarrow.array(np.arange(start, start + count)),
            "source": pyarrow.array((np.arange(start, start + count) * len(DATASETS) // rows).astype(np.int32)),
            "subtask": nothing,
            "input_ids": pyarrow.ListArray.from_arrays(starts, tokens),
            "labels": pyarrow.ListArray.from_arrays(starts, labels),
            "supervised": pyarrow.array((lengths - lengths // 2).astype(np.int32)),
            "truncated": pyarrow.array(np.zeros(count, dtype=bool)),
            "lost_end": pyarrow.array(np.zeros(count, dtype=bool)),
            "reason": nothing,
            "lost": empty,
            "left_out": empty,
        }
        yield pyarrow.RecordBatch.from_pydict(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--validation-rows", type=int, default=50)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.arrow").open("wb") as handle:
            write_batches(handle, chunks(arguments.rows, generator))
        rows = Rows(folder / "rows.arrow", DATASETS)
        cosines = generator.normal(size=(arguments.validation_rows, len(rows))).astype(np.float32)
        labels = ["a", "b"] * (arguments.validation_rows // 2)
        total = 0.0

        def timed(what: str, work: Callable[[], object]) -> object:
            nonlocal total
            started = time.perf_counter()
            found = work()
            seconds = time.perf_counter() - started
            total += seconds
            print(f"| {what} | {1e6 * seconds / len(rows):.2f} |")
            return found

        print("| path | µs a row |\n|---|---|")
        timed("batches of 4,096 tokens", lambda: token_batches(lengths_of(rows), 4096))
        timed("check of the vocabulary", lambda: largest_tokens(rows).max())
        timed("rows by dataset", lambda: np.bincount(dataset_columns(rows)[1]))
        timed(
            "making a store",
            lambda: create_store(
                folder / "store.h5",
                manifest=Manifest("float16", 1),
                row=row_numbers(rows),
                tokens=supervised_tokens(rows),
                subtask=subtasks_of(rows) if any(subtasks_of(rows)) else None,  # type: ignore[arg-type] # no row has one
            ),
        )
        settled = timed("means of subtasks over validation rows", lambda: settle(labels, cosines, None, "max"))
        names, means = settled  # type: ignore[misc]
        score, by_subtask = timed("influence", lambda: influence([means], [1.0], "max", names))  # type: ignore[misc]
        scores = timed("scores", lambda: scores_of(rows, True, score, by_subtask))
        timed("the best tenth", lambda: best_rows(scores, len(rows) // 10))  # type: ignore[arg-type]
        timed("correlation with length", lambda: length_correlation(score, supervised_tokens(rows)))
        timed(
            "the table of all scores", lambda: write_score_table(folder / "t.parquet", scores, supervised_tokens(rows))
        )  # type: ignore[arg-type]
        print(f"| all | {1e6 * total / len(rows):.2f} |")
        timed("beside these: turns of validation rows", lambda: influence([cosines], [1.0], "rows", labels))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{len(rows):,} rows, {arguments.validation_rows} validation rows; peak resident memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
