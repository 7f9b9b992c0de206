"""The sources of records and their readers: files of several formats, and datasets of the hub. Records are streamed."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.hub import HubDataset, load_hub
from dataflex.errors import UsageError
from dataflex.files import Digest, open_text, read_jsonl

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")


@dataclass(frozen=True)
class Columns:
    """Which key of a record holds what; None where the format has no such part. LLaMA-Factory's defaults."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Tags:
    """The keys of a message and the names of its roles; None where there is no such role."""

    role: str | None = "from"
    content: str | None = "value"
    user: str | None = "human"
    assistant: str | None = "gpt"
    observation: str | None = "observation"
    function: str | None = "function_call"
    system: str | None = "system"


@dataclass(frozen=True)
class Source:
    """One dataset: its file, folder of files of one kind, or place on the hub, and how its records are laid out.

    `formatting` is alpaca, sharegpt or openai as in dataset_info.json, or messages for a file given
    directly that holds OpenAI's chat messages. `split` names the rows used: `train`, or a slice of it such
    as `train[:10%]`; on the hub any split there is. `path` is None for the hub's. `entry` is who names the columns,
    in an error's words; None where they are the format's own.
    """

    name: str
    path: Path | None
    formatting: str = "alpaca"
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
    num_samples: int | None = None
    split: str = "train"
    hub: HubDataset | None = None
    entry: str | None = None


def iter_records(source: Source, digest: Digest | None = None) -> Iterator[dict[str, Any]]:
    """The records of a source, in order, never all at once; a UsageError names the file and the row that is not one.

    Args:
        digest: is given the bytes that `data_hash` hashes, all of them once the last record was taken.
    """
    if source.hub is not None:
        for record in _hub_rows(source):
            if digest is not None:
                digest.update(_hub_bytes(record))
            yield _from_arrow(record)
        return
    for path in files_of(source):
        yield from _read(path, digest)


def read_records(source: Source) -> list[dict[str, Any]]:
    """All records of a source, in order."""
    return list(iter_records(source))


def count_records(source: Source) -> int:
    """How many records a source has, counted as they are read: no other way gives the same number for every file."""
    if source.hub is not None:
        return len(_hub_rows(source))
    return sum(1 for _ in iter_records(source))


def check_columns(source: Source) -> None:
    """A UsageError if a column that dataset_info.json names is in no record. Reads until each has been met.

    The hub's columns are checked when its rows are first asked for.
    """
    if source.entry is None or source.hub is not None:
        return
    fields: dict[str, None] = {}
    for record in iter_records(source):
        if not record.keys() <= fields.keys():
            fields.update(dict.fromkeys(record))
            if not _unknown_columns(source, fields):
                return
    if fields:
        _refuse_unknown_columns(source, fields)


def first_record(path: Path) -> dict[str, Any] | None:
    """The first record of a file, None if it has none."""
    return next(_read(path), None)


def data_hash(sources: Iterable[Source]) -> str:
    """sha256 (hex) over the bytes of the sources' files, in order; of the hub's, over the records."""
    digest = hashlib.sha256()
    for source in sources:
        if source.hub is not None:
            for record in _hub_rows(source):
                digest.update(_hub_bytes(record))
            continue
        for path in files_of(source):
            _digest_file(path, digest)
    return digest.hexdigest()


def _hub_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, default=str).encode()


def _digest_file(path: Path, digest: Digest) -> None:
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)


def file_sizes(sources: Iterable[Source]) -> list[tuple[str, int]]:
    """Kind and bytes of each of the sources' files; of the hub's, its records."""
    sizes = []
    for source in sources:
        if source.hub is not None:
            sizes.append(("hub", count_records(source)))
        else:
            sizes += [(path.suffix, path.stat().st_size) for path in files_of(source)]
    return sizes


def files_of(source: Source) -> list[Path]:
    """The source's file, or the files of its folder by name."""
    if source.path is None:
        raise TypeError(f"dataset {source.name!r} is the hub's and has no files here")
    if not source.path.is_dir():
        return [source.path]
    paths = sorted(path for path in source.path.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UsageError(f"dataset {source.name!r}: the folder {source.path} has no files")
    return paths


def _hub_rows(source: Source) -> Dataset:
    rows = load_hub(source.hub, source.split)
    if source.entry is not None:
        _refuse_unknown_columns(source, rows.column_names)
    return rows


def _unknown_columns(source: Source, fields: Collection[str]) -> list[str]:
    return [column for column in vars(source.columns).values() if column is not None and column not in fields]


def _refuse_unknown_columns(source: Source, fields: Collection[str]) -> None:
    for column in _unknown_columns(source, fields):
        spelt = {field.lower(): field for field in fields}
        close = difflib.get_close_matches(column.lower(), spelt, n=1, cutoff=0.5)
        hint = f"did you mean {spelt[close[0]]!r}? " if close else ""
        raise UsageError(
            f"{source.entry}: column {column!r} is in no record; {hint}The fields there are: "
            f"{', '.join(map(repr, fields))}. Name one of these, or leave the column out"
        )


def _read(path: Path, digest: Digest | None = None) -> Iterator[dict[str, Any]]:
    readers = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".txt": _read_txt,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"data file {path}: unknown kind {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    try:
        yield from reader(path, digest)
    except OSError as error:
        raise UsageError(f"data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _read_json(path: Path, digest: Digest | None) -> Iterator[dict[str, Any]]:
    return read_jsonl(path, "data file", digest)


def _read_csv(path: Path, digest: Digest | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # of every reader in the process; a conversation outgrows the usual 128 KB
    try:
        with open_text(path, digest, newline="") as handle:
            lines = (line for line in csv.reader(handle, strict=True) if "".join(line[:1]).strip() or len(line) > 1)
            header = next(lines, [])
            for number, line in enumerate(lines):
                if len(line) != len(header):
                    raise UsageError(f"data file {path}, row {number}: not as many fields as the header names")
                yield {key: value or None for key, value in zip(header, line, strict=True)}  # empty is absent in csv
    except csv.Error as error:
        raise UsageError(f"data file {path}: not valid CSV ({error})") from None


def _read_txt(path: Path, digest: Digest | None) -> Iterator[dict[str, Any]]:
    with open_text(path, digest) as handle:
        for line in handle:
            yield {"text": line.removesuffix("\n")}


def _read_parquet(path: Path, digest: Digest | None) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if digest is not None:  # the file is not read from its first byte to its last
        _digest_file(path, digest)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(_from_arrow, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UsageError(f"data file {path}: not a parquet file ({error})") from None


def _read_arrow(path: Path, digest: Digest | None) -> Iterator[dict[str, Any]]:
    import pyarrow

    if digest is not None:
        _digest_file(path, digest)
    try:
        with pyarrow.memory_map(str(path)) as handle:
            for batch in _arrow_batches(handle):
                yield from map(_from_arrow, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UsageError(f"data file {path}: not an Arrow file ({error})") from None


def _arrow_batches(handle: pyarrow.MemoryMappedFile) -> Iterator[pyarrow.RecordBatch]:
    """The batches of Arrow's stream format, which `datasets` writes, or of its file format."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_stream(handle)
    except pyarrow.ArrowInvalid:
        handle.seek(0)
        file = pyarrow.ipc.open_file(handle)
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        yield from reader


def _from_arrow(record: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table as JSON lines would hold it.

    Arrow gives every struct every field that any row's has, and fills with null: such fields are left out. NaN is null.
    """
    return {key: _without_fillings(value) for key, value in record.items()}


def _without_fillings(value: Any) -> Any:
    if isinstance(value, dict):
        kept = ((key, _without_fillings(item)) for key, item in value.items())
        return {key: item for key, item in kept if item is not None}
    if isinstance(value, list):
        return [_without_fillings(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
