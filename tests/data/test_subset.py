from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pytest

from dataflex.config import RunConfig
from dataflex.data.catalog import find_sources, recognise
from dataflex.data.conversations import to_conversation
from dataflex.data.examples import load_split, row_encoder
from dataflex.data.records import Source, data_hash, read_records
from dataflex.data.subset import as_messages, subset_records, take_records
from dataflex.errors import UsageError
from dataflex.files import write_jsonl

POOL = Path(__file__).parent / "fixtures" / "pool"
ROWS = [7, 3, 11, 0]


def subset_of(sources: list[Source], rows: list[int]) -> list[dict]:
    taken, _ = take_records(sources, rows)
    return subset_records([taken[row] for row in rows], rows)


def round_trip(names: list[str], folder: Path, rows: list[int], tmp_path: Path, tokenizer) -> list[dict]:
    """The records of `rows`, having checked that they read back to the same tokens in their order."""
    records = subset_of(find_sources(names, folder), rows)
    path = tmp_path / "subset.jsonl"
    write_jsonl(
        path, [{**record, "dataflex": {"row": row, "score": 0.5}} for row, record in zip(rows, records, strict=True)]
    )
    common = {"template": "qwen", "dataset_dir": str(folder)}
    whole = load_split(RunConfig(dataset=names, **common), tokenizer)
    by_row = {example.row: example for example in whole.examples}
    again = load_split(RunConfig(dataset=[str(path)], **common), tokenizer).examples
    assert [(e.input_ids, e.labels) for e in again] == [(by_row[row].input_ids, by_row[row].labels) for row in rows]
    return records


@pytest.mark.parametrize("name", ["alpaca_en_demo", "glaive_toolcall_en_demo"])
def test_one_format_is_written_as_it_was(name: str, data_dir: Path, tmp_path: Path, tokenizer) -> None:
    records = round_trip([name], data_dir, ROWS, tmp_path, tokenizer)
    source = json.loads((data_dir / f"{name}.json").read_text())
    assert records == [source[row] for row in ROWS]


def test_two_sources_of_one_format_too(data_dir: Path, tmp_path: Path, tokenizer) -> None:
    records = round_trip(["identity", "alpaca_zh_demo"], data_dir, [95, 2], tmp_path, tokenizer)
    assert all(set(record) == {"instruction", "input", "output"} for record in records)


def test_mixed_formats_become_messages(data_dir: Path, tmp_path: Path, tokenizer) -> None:
    records = round_trip(["identity", "glaive_toolcall_en_demo"], data_dir, [91, 0, 94, 101, 90], tmp_path, tokenizer)
    assert all(set(record) <= {"messages", "tools"} for record in records)
    calls = [m for record in records for m in record["messages"] if "tool_calls" in m]
    assert calls and all(isinstance(call["tool_calls"][0]["function"]["arguments"], dict) for call in calls)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("history", [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        ("turns", [0, 1, 2, 3, 4, 5, 6, 11]),
        ("chat", [0, 1, 2, 3, 4, 5, 6, 8]),
    ],
)
def test_odd_rows_round_trip_through_messages(name: str, rows: list[int], tokenizer) -> None:
    (source,) = find_sources([name], POOL)
    records = read_records(source)
    encode = row_encoder(RunConfig(template="qwen"), tokenizer)
    layout = recognise("subset", Path("subset.jsonl"), {"messages": []})
    for row in rows:
        conversation = to_conversation(source, records[row])
        again = to_conversation(layout, json.loads(json.dumps(as_messages(conversation))))
        assert encode(again) == encode(conversation), row


@pytest.mark.parametrize(("name", "rows"), [("history", [9, 0]), ("turns", [2, 0, 11]), ("chat", [4, 1, 0])])
def test_whole_files_of_odd_rows(name: str, rows: list[int], tmp_path: Path, tokenizer) -> None:
    records = round_trip([name], POOL, rows, tmp_path, tokenizer)
    as_it_was = name == "turns"  # the others have columns of their own, or LLaMA-Factory's `openai` system text
    assert ("messages" in records[0]) != as_it_was


def test_a_column_that_was_not_read_stays_unread(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("plain", [{"instruction": "a", "output": "b", "system": "unread", "subtask": "s"}])
    (record,) = round_trip(["plain"], tmp_path, [0], tmp_path, tokenizer)
    assert "unread" not in str(record)
    assert record["subtask"] == "s"


def test_rows_that_are_not_there(data_dir: Path) -> None:
    sources = find_sources(["identity"], data_dir)
    taken, total = take_records(sources, [0, 91])
    assert (list(taken), total) == ([0], 91)
    with pytest.raises(UsageError, match="row 98 of turns cannot be written as messages: no response"):
        subset_of([*sources, *find_sources(["turns"], POOL)], [0, 91 + 7])
    assert subset_of(sources, []) == []


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt", "parquet", "arrow"])
def test_one_reading_gives_records_and_hash(kind: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": "ö" * n} for n in range(1, 2500)]
    path = tmp_path / f"rows.{kind}"
    frame = datasets.Dataset.from_list(rows)
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "csv":
        frame.to_csv(str(path))
    elif kind == "txt":
        path.write_text("".join(f"{row}\r\n" for row in rows), encoding="utf-8", newline="")
    elif kind == "parquet":
        frame.to_parquet(str(path))
    else:
        frame.save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    source, digest = Source("rows", path), hashlib.sha256()
    taken, total = take_records([source], [2000, 3], digest)
    assert digest.hexdigest() == data_hash([source])
    whole = read_records(source)
    assert total == len(whole) and taken == {row: (source, whole[row]) for row in (3, 2000)}
