"""Where rows come from and how a file's rows are read: json, jsonl, csv and parquet, each row a dict."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex.errors import UsageError
from dataflex.files import read_jsonl

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


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
    """One dataset: its file (or folder of files of one kind) and how its records are laid out.

    `formatting` is alpaca, sharegpt or openai as in dataset_info.json, or messages for a file given
    directly that holds OpenAI's chat messages.
    """

    name: str
    path: Path
    formatting: str = "alpaca"
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
    num_samples: int | None = None


def read_records(source: Source) -> list[dict[str, Any]]:
    """All records of a source, in order; a UsageError names the file and the row that is not one."""
    return [record for path in files_of(source) for record in _read(path)]


def first_record(path: Path) -> dict[str, Any] | None:
    """The first record of a file, None if it has none."""
    return next(_read(path), None)


def data_hash(sources: Iterable[Source]) -> str:
    """sha256 (hex) over the bytes of the sources' files, in order."""
    digest = hashlib.sha256()
    for source in sources:
        for path in files_of(source):
            with open(path, "rb") as handle:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def files_of(source: Source) -> list[Path]:
    """The source's file, or the files of its folder by name."""
    if not source.path.is_dir():
        return [source.path]
    paths = sorted(path for path in source.path.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UsageError(f"dataset {source.name!r}: the folder {source.path} has no files")
    return paths


def _read(path: Path) -> Iterator[dict[str, Any]]:
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"data file {path}: unknown kind {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    return reader(path)


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    return read_jsonl(path, "data file")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {path}: not UTF-8 text ({error.reason})") from None
    try:
        rows = json.loads(text)
    except RecursionError:
        raise UsageError(f"data file {path}: nested too deeply to be read") from None
    except ValueError as error:
        if _looks_like_jsonl(text):
            yield from read_jsonl(path, "data file")
            return
        raise UsageError(f"data file {path}: not valid JSON ({error})") from None
    if isinstance(rows, dict):
        rows = [rows]  # JSON lines of a single line
    if not isinstance(rows, list):
        raise UsageError(f"data file {path}: expected a list of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UsageError(f"data file {path}, row {number}: expected an object, found {type(row).__name__}")
        yield row


def _looks_like_jsonl(text: str) -> bool:
    lines = [line for line in islice(text.splitlines(), 100) if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except ValueError:
        return False


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle, strict=True)):
                if None in row or None in row.values():
                    raise UsageError(f"data file {path}, row {number}: not as many fields as the header names")
                yield {key: value or None for key, value in row.items()}  # csv cannot tell empty from absent
    except OSError as error:
        raise UsageError(f"data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {path}: not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise UsageError(f"data file {path}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        raise UsageError(f"data file {path}: {error.strerror or error}") from None
    except pyarrow.ArrowException as error:
        raise UsageError(f"data file {path}: not a parquet file ({error})") from None
    yield from table.to_pylist()
