"""From records to encoded rows, chunk by chunk, in as many processes as the configuration asks for."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from dataflex.data.conversations import Conversation, Unusable, to_conversation
from dataflex.data.encoding import UNSUPERVISED, Encoded
from dataflex.data.records import Source, iter_records
from dataflex.data.rows import Outcome, as_batch
from dataflex.errors import UsageError
from dataflex.json_text import json_line

if TYPE_CHECKING:
    import pyarrow

CHUNK = 250  # rows that travel together
NOTHING_SUPERVISED = {
    True: "no supervised token within cutoff_len",
    False: "no supervised token (the chat template writes none for the response)",
}
"""By whether the row was truncated."""

Item = tuple[int, int, dict[str, Any]]  # row number, which source, record
Encode = Callable[[Conversation], Encoded]


def encode_records(
    sources: Sequence[Source], indices: Sequence[Sequence[int]], encode: Encode, workers: int | None
) -> Iterator[pyarrow.RecordBatch]:
    """The chosen records of the sources as batches of rows, in order.

    Args:
        indices: the records used of each source, ascending.
        encode: from a conversation to tokens.
        workers: processes that do it, at most one a core; None and 1 are this process.
    """
    chunk_encoder = _ChunkEncoder(sources, encode)
    chunks = _chunked(_items(sources, indices), CHUNK)
    processes = min(workers or 1, available_cores())
    if processes == 1:
        return map(chunk_encoder, chunks)
    return _in_processes(chunk_encoder, chunks, processes)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_record(sources: Sequence[Source], encode: Encode, item: Item) -> Outcome:
    """One record as tokens and labels, or the reason why it cannot be used."""
    row, source, record = item
    subtask = subtask_of(sources[source], record, row)
    try:
        conversation = to_conversation(sources[source], record)
        encoded = encode(conversation)
    except Unusable as reason:
        return Outcome(row, source, reason=_printable(str(reason)))
    except RecursionError:
        return Outcome(row, source, reason="malformed record (it is nested too deeply to be worded; flatten it)")
    # The first label has no token before it to be predicted from.
    supervised = sum(label != UNSUPERVISED for label in encoded.labels[1:])
    if not supervised:
        return Outcome(row, source, reason=NOTHING_SUPERVISED[encoded.truncated])
    if subtask is None and len(sources) > 1:
        subtask = sources[source].name
    return Outcome(
        row,
        source,
        subtask,
        encoded.input_ids,
        encoded.labels,
        supervised,
        encoded.truncated,
        encoded.lost_end,
        lost=encoded.lost,
        left_out=(*conversation.left_out, *encoded.left_out),
    )


def subtask_of(source: Source, record: dict[str, Any], row: int) -> str | None:
    """A record's `subtask` as text: a number or a date gives the name that it is written as.

    Raises:
        UsageError: it is a list or an object, which is no name.
    """
    value = record.get("subtask")
    if value is None or isinstance(value, str):
        return value and _printable(value)
    if isinstance(value, list | dict):
        raise UsageError(
            f"dataset {source.name}, row {row}: subtask is of type {type(value).__name__}; give it a text or a number"
        )
    return json_line(value).strip('"')


def _printable(text: str) -> str:
    """`text` with half surrogate pairs, which no file can hold, spelt out."""
    return text.encode(errors="backslashreplace").decode()


class _ChunkEncoder:
    """A chunk of records as a batch of rows."""

    def __init__(self, sources: Sequence[Source], encode: Encode) -> None:
        self.sources = sources
        self.encode = encode

    def __call__(self, chunk: Sequence[Item]) -> pyarrow.RecordBatch:
        return as_batch([encode_record(self.sources, self.encode, item) for item in chunk])


def _items(sources: Sequence[Source], indices: Sequence[Sequence[int]]) -> Iterator[Item]:
    start = 0
    for number, (source, wanted) in enumerate(zip(sources, indices, strict=True)):
        remaining = iter(wanted)
        next_wanted, size = next(remaining, None), 0
        for index, record in enumerate(iter_records(source)):
            size += 1
            if index == next_wanted:
                yield start + index, number, record
                next_wanted = next(remaining, None)
        start += size


def _chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


_here: _ChunkEncoder  # in a worker: what it encodes with


def _in_processes(
    chunk_encoder: _ChunkEncoder, chunks: Iterable[list[Item]], processes: int
) -> Iterator[pyarrow.RecordBatch]:
    # Forked, so the tokenizer is there at once and a caller's script is not run again; only records travel.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (chunk_encoder,))
    pending: deque[Future[pyarrow.RecordBatch]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_here, chunk))
            if len(pending) > 2 * processes:  # few enough that the data is not all read ahead
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(chunk_encoder: _ChunkEncoder) -> None:
    global _here
    _here = chunk_encoder


def _encode_here(chunk: list[Item]) -> pyarrow.RecordBatch:
    return _here(chunk)
