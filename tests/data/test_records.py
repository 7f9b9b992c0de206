from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dataflex.data.records import Source, count_records, data_hash, first_record, iter_records, read_records
from dataflex.errors import UsageError

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "ü", "output": None}]


def write(path: Path, text: str) -> Source:
    path.write_text(text, encoding="utf-8")
    return Source("rows", path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_lines_are_read_under_either_suffix(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"rows.{suffix}", "".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_records(source) == ROWS
    assert first_record(source.path) == ROWS[0]


def test_json_list(tmp_path: Path) -> None:
    assert read_records(write(tmp_path / "rows.json", json.dumps(ROWS))) == ROWS
    assert read_records(write(tmp_path / "empty.json", "[]")) == []
    assert read_records(write(tmp_path / "lines.jsonl", json.dumps(ROWS))) == ROWS


def test_csv_has_no_empty_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", 'instruction,output\n"two\nlines",42\nb,\n')
    assert read_records(source) == [{"instruction": "two\nlines", "output": "42"}, {"instruction": "b", "output": None}]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_records(Source("rows", tmp_path / "rows.parquet")) == ROWS


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow(tmp_path: Path, kind: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read_records(Source("rows", tmp_path / "rows.arrow")) == ROWS


def test_a_text_file_is_a_record_a_line(tmp_path: Path) -> None:
    assert read_records(write(tmp_path / "rows.txt", "one\n\ntwo")) == [{"text": line} for line in ("one", "", "two")]


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [("a.jsonl", '{"a": 1}\n\n \n{"a": 2}', 2), ("a.json", '[{"a": 1}, {"a": 2}, {}]', 3), ("a.csv", "a\n1\n2\n", 2)],
)
def test_records_are_counted_as_they_are_read(tmp_path: Path, name: str, text: str, count: int) -> None:
    source = write(tmp_path / name, text)
    assert count_records(source) == len(read_records(source)) == count


def test_records_come_one_by_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", '[{"a": 1}, 2]')
    records = iter_records(source)
    assert next(records) == {"a": 1}
    with pytest.raises(UsageError, match="row 1"):
        next(records)


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", json.dumps(ROWS[1]))
    write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    assert read_records(Source("rows", tmp_path)) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"a": 1}, 2]', "row 1: expected an object, found int"),
        ("a.json", '"text"', "line 1: expected an object, found str"),
        ("a.json", '[{"a": 1}', "line 1: not JSON"),
        ("a.json", '{"a": ' + "[" * 100_000, "nested too deeply"),
        ("a.json", '{"a": 1}\n[2]\n', "line 2: expected an object"),
        ("a.jsonl", '{"a": 1}\nnot json\n', "line 2: not JSON"),
        ("a.csv", "a,b\n1\n", "row 0: not as many fields"),
        ("a.parquet", "text", "not a parquet file"),
        ("a.arrow", "text", "not an Arrow file"),
        ("a.xml", "text", "unknown kind '.xml'"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = write(tmp_path / name, text)
    with pytest.raises(UsageError, match=message) as error:
        read_records(source)
    assert str(source.path) in str(error.value)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        read_records(Source("a", tmp_path / "a.json"))


def test_hash_is_of_the_bytes_in_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", "[]"), write(tmp_path / "b.json", "[ ]")
    assert data_hash([a, b]) == hashlib.sha256(b"[][ ]").hexdigest()
    assert data_hash([b, a]) != data_hash([a, b])
