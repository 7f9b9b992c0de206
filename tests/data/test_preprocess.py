from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dataflex.data import preprocess
from dataflex.data.encoding import Encoded
from dataflex.data.preprocess import available_cores, encode_records
from dataflex.data.records import Source
from dataflex.errors import UsageError


def source_of(path: Path, count: int, name: str = "s") -> Source:
    path.write_text("".join(json.dumps({"instruction": str(n), "output": "x"}) + "\n" for n in range(count)))
    return Source(name, path)


def encode(conversation) -> Encoded:
    """The record's number and the process, as tokens."""
    tokens = [0, int(conversation.messages[0].content), os.getpid()]
    return Encoded(tokens, tokens, False, False)


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_rows_come_in_order_whatever_works_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 7)
    monkeypatch.setattr(preprocess, "available_cores", lambda: 2)
    sources = [source_of(tmp_path / "a.jsonl", 100), source_of(tmp_path / "b.jsonl", 50, "t")]
    places = [range(90), [3, 49]]
    rows = [row for batch in encode_records(sources, places, encode, workers) for row in batch.to_pylist()]
    assert [(row["row"], row["source"], row["input_ids"][1]) for row in rows] == [
        *((number, 0, number) for number in range(90)),
        (103, 1, 3),
        (149, 1, 49),
    ]
    assert {row["subtask"] for row in rows} == {"s", "t"}
    processes = {row["input_ids"][2] for row in rows}
    assert (os.getpid() in processes) == (workers != 2)
    assert len(processes) <= (workers or 1)


def test_no_more_processes_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "available_cores", lambda: 1)
    sources = [source_of(tmp_path / "a.jsonl", 10)]
    (batch,) = encode_records(sources, [range(10)], encode, 16)
    assert {row["input_ids"][2] for row in batch.to_pylist()} == {os.getpid()}
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_data_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 2)
    monkeypatch.setattr(preprocess, "available_cores", lambda: 2)
    read = []

    def records(source: Source):
        for number in range(10_000):
            read.append(number)
            yield {"instruction": str(number), "output": "x"}

    monkeypatch.setattr(preprocess, "iter_records", records)
    batches = encode_records([Source("s", None)], [range(10_000)], encode, workers)
    next(iter(batches))
    assert len(read) < 100


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_breaks_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(preprocess, "CHUNK", 2)
    monkeypatch.setattr(preprocess, "available_cores", lambda: 2)
    source = source_of(tmp_path / "a.jsonl", 9)
    with open(source.path, "a") as handle:
        handle.write("broken\n")
    with pytest.raises(UsageError, match=r"a\.jsonl, line 10: not JSON"):
        list(encode_records([source], [range(10)], encode, workers))
