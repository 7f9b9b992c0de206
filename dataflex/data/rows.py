"""Encoded rows on disk: an Arrow file, mapped into memory, so that a dataset may be larger than memory.

Every row that was looked at has its place in the file, the dropped ones with the reason, so the report can
be had from a cached file as well. So has the fingerprint of the kept rows: with each batch the file keeps the
digest of all rows up to its end.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, overload

import numpy as np

from dataflex.data.encoding import UNSUPERVISED
from dataflex.data.report import Report

if TYPE_CHECKING:
    import pyarrow

DIGEST = b"dataflex.digest"


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One row, ready for the model.

    `row` counts through the datasets in the order named, before any row was dropped. `labels` are -100
    where unsupervised. `subtask` is the record's own, else its dataset's name where several are given.
    """

    row: int
    input_ids: list[int]
    labels: list[int]
    subtask: str | None
    dataset: str

    def __repr__(self) -> str:
        """Whose row it is and how long, without its hundreds of numbers."""
        learned = sum(label != UNSUPERVISED for label in self.labels)
        subtask = f", subtask {self.subtask!r}" if self.subtask is not None else ""
        return f"<row {self.row} of {self.dataset!r}{subtask}: {len(self.input_ids)} tokens, {learned} learned>"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of encoding one row. A dropped row has a `reason` and no tokens."""

    row: int
    source: int
    """Which of the datasets, counted from 0."""
    subtask: str | None = None
    input_ids: Sequence[int] = ()
    labels: Sequence[int] = ()
    supervised: int = 0
    truncated: bool = False
    lost_end: bool = False
    reason: str | None = None
    lost: Sequence[str] = ()
    """What the record says and the tokens do not, a phrase each."""
    left_out: Sequence[str] = ()
    """What of the record is not read, a phrase each."""


class Rows(Sequence[Example]):
    """The kept rows of an Arrow file as Examples, in row order; each is read when it is asked for."""

    def __init__(self, path: Path, datasets: Sequence[str]) -> None:
        import pyarrow

        with pyarrow.memory_map(str(path)) as handle:
            file = pyarrow.ipc.open_file(handle)
            batches = [file.get_batch_with_custom_metadata(number) for number in range(file.num_record_batches)]
        self._datasets = list(datasets)
        self._batches = [_Columns(batch) for batch, _ in batches]
        digest = batches[-1][1][DIGEST].decode() if batches else _Digest().hexdigest()
        self.fingerprint = hashlib.sha256(json.dumps([digest, self._datasets]).encode()).hexdigest()
        """sha256 (hex) over row, input_ids, labels, subtask and dataset of every kept row, in order."""
        self._starts = list(accumulate((len(batch.kept) for batch in self._batches), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # negative ones count from the end; beyond it is an IndexError
        number = bisect.bisect_right(self._starts, position) - 1
        return self._batches[number].example(position - self._starts[number], self._datasets)

    def __iter__(self) -> Iterator[Example]:
        for batch in self._batches:
            for position in range(len(batch.kept)):
                yield batch.example(position, self._datasets)

    def column(self, name: Literal["row", "source", "supervised", "length"]) -> np.ndarray:
        """[N] one number for each kept row: its row number, the index of its dataset, its supervised tokens, its
        tokens."""
        parts = [batch.column(name) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets, in the order in which they were named."""
        return list(self._datasets)

    def subtasks(self) -> list[str | None]:
        """[N] the subtask of each kept row."""
        return [name for batch in self._batches for name in batch.subtask.take(batch.kept).to_pylist()]

    def largest_tokens(self) -> np.ndarray:
        """[N] the largest token of each kept row."""
        parts = [batch.largest_tokens() for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All tokens of the kept rows, some rows at a time: [n + 1] where each row begins, and [T] int32 tokens."""
        for batch in self._batches:
            lengths = np.diff(batch.starts)[batch.kept]  # a dropped row has no tokens
            yield np.concatenate([[0], np.cumsum(lengths)]), batch.input_ids

    def report(self) -> Report:
        """The report over all rows of the file."""
        report = Report(kept=len(self))
        for batch in self._batches:
            report.seen += len(batch.row)
            report.truncated += int(batch.truncated.sum())
            report.lost_end += int(batch.lost_end.sum())
            report.supervised_tokens += int(batch.supervised.sum())
            report.lengths += np.diff(batch.starts)[batch.kept].tolist()
            for position in np.flatnonzero(batch.dropped).tolist():
                report.dropped.setdefault(batch.reason[position].as_py(), []).append(int(batch.row[position]))
            for phrases, rows in ((batch.lost, report.lost), (batch.left_out, report.left_out)):
                for position in np.flatnonzero(np.diff(phrases.offsets.to_numpy())).tolist():
                    for phrase in phrases[position].as_py():
                        rows.setdefault(phrase, []).append(int(batch.row[position]))
        return report


class _Columns:
    """The columns of one batch as arrays over the mapped bytes."""

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        self.row = batch["row"].to_numpy()
        self.source = batch["source"].to_numpy()
        self.supervised = batch["supervised"].to_numpy()
        self.truncated = batch["truncated"].to_numpy(zero_copy_only=False)
        self.lost_end = batch["lost_end"].to_numpy(zero_copy_only=False)
        self.subtask, self.reason = batch["subtask"], batch["reason"]
        self.lost, self.left_out = batch["lost"], batch["left_out"]
        self.starts = batch["input_ids"].offsets.to_numpy()
        self.input_ids = batch["input_ids"].values.to_numpy()
        self.labels = batch["labels"].values.to_numpy()
        self.dropped = self.reason.is_valid().to_numpy(zero_copy_only=False)
        self.kept = np.flatnonzero(~self.dropped)

    def column(self, name: str) -> np.ndarray:
        """The numbers of the kept rows, as `Rows.column` names them."""
        values: np.ndarray = np.diff(self.starts) if name == "length" else getattr(self, name)
        return values[self.kept]

    def largest_tokens(self) -> np.ndarray:
        """The largest token of each kept row."""
        if not len(self.kept):
            return np.zeros(0, dtype=np.int64)
        return np.maximum.reduceat(self.input_ids, self.starts[self.kept])  # a dropped row has no tokens

    def example(self, index: int, datasets: Sequence[str]) -> Example:
        position = int(self.kept[index])
        start, end = self.starts[position], self.starts[position + 1]
        return Example(
            int(self.row[position]),
            self.input_ids[start:end].tolist(),
            self.labels[start:end].tolist(),
            self.subtask[position].as_py(),
            datasets[self.source[position]],
        )


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[N] the tokens of each row."""
    if isinstance(examples, Rows):
        return examples.column("length")
    return np.array([len(example.input_ids) for example in examples], dtype=np.int64)


def supervised_tokens(examples: Sequence[Example]) -> np.ndarray:
    """[N] how many tokens of each row training learns from."""
    if isinstance(examples, Rows):
        return examples.column("supervised")
    counts = [sum(label != UNSUPERVISED for label in example.labels[1:]) for example in examples]
    return np.array(counts, dtype=np.int64)


def row_numbers(examples: Sequence[Example]) -> np.ndarray:
    """[N] int64: the row number of each row."""
    if isinstance(examples, Rows):
        return examples.column("row")
    return np.array([example.row for example in examples], dtype=np.int64)


def dataset_columns(examples: Sequence[Example]) -> tuple[list[str], np.ndarray]:
    """The names of the datasets in order, and [N] the index of each row's dataset among them."""
    if isinstance(examples, Rows):
        return examples.datasets, examples.column("source")
    names = list(dict.fromkeys(example.dataset for example in examples))
    return names, np.array([names.index(example.dataset) for example in examples], dtype=np.int64)


def count_by_dataset(examples: Sequence[Example], indices: Iterable[int]) -> dict[str, int]:
    """How many of the rows at `indices` come from each dataset that has a row, in the order the datasets were named."""
    names, source = dataset_columns(examples)
    chosen = np.bincount(source[np.fromiter(indices, dtype=np.int64)], minlength=len(names))
    present = np.bincount(source, minlength=len(names))
    return {name: int(count) for name, count, there in zip(names, chosen, present, strict=True) if there}


def subtasks_of(examples: Sequence[Example]) -> list[str | None]:
    """[N] the subtask of each row."""
    return examples.subtasks() if isinstance(examples, Rows) else [example.subtask for example in examples]


def largest_tokens(examples: Sequence[Example]) -> np.ndarray:
    """[N] the largest token of each row."""
    if isinstance(examples, Rows):
        return examples.largest_tokens()
    return np.array([max(example.input_ids) for example in examples], dtype=np.int64)


def iter_tokens(examples: Sequence[Example]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens of the rows, some rows at a time: [n + 1] where each row begins, and [T] int32 tokens."""
    if isinstance(examples, Rows):
        yield from examples.tokens()
        return
    starts = np.cumsum([0, *(len(example.input_ids) for example in examples)])
    yield starts, np.array([token for example in examples for token in example.input_ids], dtype=np.int32)


def as_batch(outcomes: Sequence[Outcome]) -> pyarrow.RecordBatch:
    """Rows as a record batch of the file."""
    import pyarrow

    schema = _schema()
    arrays = [
        pyarrow.array([getattr(outcome, field.name) for outcome in outcomes], type=field.type) for field in schema
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def write_batches(handle: IO[bytes], batches: Iterable[pyarrow.RecordBatch]) -> None:
    """Write a whole file of rows, a batch at a time, with the digest of all rows so far beside each batch."""
    import pyarrow

    digest = _Digest()
    with pyarrow.ipc.new_file(handle, _schema()) as writer:
        for batch in batches:
            digest.update(_Columns(batch))
            writer.write_batch(batch, custom_metadata={DIGEST: digest.hexdigest()})


class _Digest:
    """sha256 over the columns of the kept rows. How rows are cut into batches has no part in it."""

    def __init__(self) -> None:
        self._columns = [hashlib.sha256() for _ in range(6)]

    def update(self, batch: _Columns) -> None:
        subtasks = batch.subtask.take(batch.kept).to_pylist()
        parts = (
            batch.row[batch.kept].astype("<i8"),
            batch.source[batch.kept].astype("<i4"),
            np.diff(batch.starts)[batch.kept].astype("<i4"),
            batch.input_ids.astype("<i4"),  # a dropped row has none
            batch.labels.astype("<i4"),
            "".join(json.dumps(name) + "\n" for name in subtasks).encode(),
        )
        for column, part in zip(self._columns, parts, strict=True):
            column.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(column.digest() for column in self._columns)).hexdigest()


def _schema() -> pyarrow.Schema:
    import pyarrow

    tokens = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        {
            "row": pyarrow.int64(),
            "source": pyarrow.int32(),
            "subtask": pyarrow.string(),
            "input_ids": tokens,
            "labels": tokens,
            "supervised": pyarrow.int32(),
            "truncated": pyarrow.bool_(),
            "lost_end": pyarrow.bool_(),
            "reason": pyarrow.string(),
            "lost": pyarrow.list_(pyarrow.string()),
            "left_out": pyarrow.list_(pyarrow.string()),
        }
    )
