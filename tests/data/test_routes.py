"""The same records in any file are the same rows by every route: count, load, select, inspect, dry run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.config import RunConfig
from dataflex.data.catalog import find_sources, recognise
from dataflex.data.examples import load_split
from dataflex.data.records import Source, count_records, first_record, iter_records, read_records
from dataflex.data.subset import subset_records, take_records
from dataflex.errors import UsageError
from dataflex.files import write_jsonl
from dataflex.inspection import inspect
from dataflex.planning import plan

Record = dict[str, str | None]
FIELDS = ("instruction", "input", "output")


def lines(end: str, between: str = "") -> Callable[[list[Record]], bytes]:
    return lambda records: "".join(json.dumps(record) + end + between for record in records).encode()


def as_csv(end: str, blank: str = "") -> Callable[[list[Record]], bytes]:
    def write(records: list[Record]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerow(FIELDS)
        for record in records:
            text.write(blank)
            writer.writerow([record[field] or "" for field in FIELDS])
        return text.getvalue().encode()

    return write


def table_of(records: list[Record]):
    import pyarrow

    schema = pyarrow.schema({field: pyarrow.string() for field in FIELDS})
    return pyarrow.Table.from_pylist(records, schema=schema)


def as_parquet(records: list[Record]) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table_of(records), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow(kind: str) -> Callable[[list[Record]], bytes]:
    def write(records: list[Record]) -> bytes:
        import pyarrow

        sink, table = io.BytesIO(), table_of(records)
        with getattr(pyarrow.ipc, f"new_{kind}")(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return sink.getvalue()

    return write


MARK = b"\xef\xbb\xbf"
JSON = {
    "lines": lines("\n"),
    "lines after a byte order mark": lambda records: MARK + lines("\n")(records),
    "lines that end with CR": lines("\r"),
    "lines that end with CRLF": lines("\r\n"),
    "blank and space-only lines": lines("\n", "\n \t \n\u00a0\n"),
    "joined files": lambda records: b"\n".join(MARK + lines("\n")([record]) for record in records),
    "concatenated objects": lambda records: "".join(json.dumps(record, indent=1) for record in records).encode(),
    "an array": lambda records: json.dumps(records).encode(),
    "an indented array after a mark": lambda records: MARK + json.dumps(records, indent=2).encode(),
    "NaN for null": lambda records: json.dumps(
        [dict.fromkeys(record, math.nan) | {k: v for k, v in record.items() if v is not None} for record in records]
    ).encode(),
}
FILES = {
    **{f"{name} in {suffix}": (suffix, write) for suffix in (".json", ".jsonl") for name, write in JSON.items()},
    "csv": (".csv", as_csv("\n")),
    "csv after a byte order mark": (".csv", lambda records: MARK + as_csv("\r\n")(records)),
    "csv with CR": (".csv", as_csv("\r")),
    "csv with blank and space-only lines": (".csv", as_csv("\n", "\n  \n")),
    "parquet": (".parquet", as_parquet),
    "arrow stream": (".arrow", as_arrow("stream")),
    "arrow file": (".arrow", as_arrow("file")),
}


def with_nulls(record: Record) -> Record:
    """CSV does not tell an empty text from null, so neither do these records."""
    return {key: value or None for key, value in record.items()}


def answers(folder: Path, path: Path, tokenizer) -> dict[str, list]:
    """What each route makes of a file: its records, or their number, or what became of each row."""
    source = recognise("rows", path, first_record(path))
    config = RunConfig(dataset=[str(path)], template="smollm2", cutoff_len=64)
    (found,) = find_sources(config.dataset, config.dataset_dir)
    assert (found.formatting, found.columns) == (source.formatting, source.columns)
    records = read_records(source)
    everything = list(range(len(records)))
    looked_at = inspect(path, config)
    split = load_split(config, tokenizer, keep=False)
    taken, _ = take_records([source], everything)
    write_jsonl(folder / "subset.jsonl", subset_records(list(taken.values()), everything))
    return {
        "records": [records, list(iter_records(source)), read_records(Source("subset", folder / "subset.jsonl"))],
        "number": [len(records), count_records(source), looked_at.facts["rows"], split.report.seen],
        "dropped": [
            {reason: len(rows) for reason, rows in split.report.dropped.items()},
            looked_at.facts["dropped"],
        ],
        "rows": [[(example.row, example.input_ids, example.labels) for example in split.examples]],
    }


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=20)
RECORDS = st.lists(
    st.fixed_dictionaries({"instruction": TEXT, "input": st.none() | TEXT, "output": st.none() | TEXT}).map(with_nulls),
    min_size=1,
    max_size=5,
)
KEPT = {"instruction": "a", "input": None, "output": "b"}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS)
def test_every_file_and_every_route_gives_the_same_rows(
    records: list[Record], tmp_path: Path, _loaded_tokenizer
) -> None:
    records = [KEPT, *records]
    expected = None
    for name, (suffix, write) in FILES.items():
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(write(records))
        found = answers(tmp_path, path, _loaded_tokenizer)
        assert all(one == records for one in found["records"]), name
        assert set(found["number"]) == {len(records)}, name
        assert found["dropped"][0] == found["dropped"][1], name
        rows = found["rows"], found["dropped"]
        expected = expected or rows
        assert rows == expected, name


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    records = [{"instruction": str(number), "input": None, "output": "b"} for number in range(6)]
    for number, name in enumerate(("lines in .jsonl", "an array in .json")):
        suffix, write = FILES[name]
        (tmp_path / f"{number}{suffix}").write_bytes(write(records[3 * number : 3 * number + 3]))
    source = Source("rows", tmp_path)
    assert read_records(source) == records
    assert count_records(source) == 6


@pytest.mark.parametrize("name", ["lines in .jsonl", "csv", "parquet", "an array in .json"])
def test_a_field_of_any_length_is_read(tmp_path: Path, name: str) -> None:
    suffix, write = FILES[name]
    records = [{"instruction": "a", "input": None, "output": "word " * 50_000}, KEPT]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(write(records))
    assert read_records(Source("rows", path)) == records


def test_csv_rows_of_another_width_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\na,b\n \nc\n")
    with pytest.raises(UsageError, match=r"rows\.csv, row 1: not as many fields as the header names"):
        count_records(Source("rows", path))


@pytest.mark.parametrize(
    "name", ["lines after a byte order mark in .jsonl", "concatenated objects in .json", "parquet"]
)
def test_a_dry_run_and_the_commands_agree(tmp_path: Path, tiny_run: dict, run_cli, name: str) -> None:
    suffix, write = FILES[name]
    records = [{"instruction": str(number), "input": None, "output": "b" if number else None} for number in range(5)]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(write(records))
    config = RunConfig(**{**tiny_run, "dataset": str(path), "output_dir": str(tmp_path / "out"), "max_samples": None})
    found = plan(config, "warmup").data["train"]
    assert (found["rows"], found["kept"], found["first_dropped"]) == (5, 4, {"no response": 0})
    (tmp_path / "scores.jsonl").write_text("".join(f'{{"row": {row}, "score": {row}.0}}\n' for row in range(5)))
    arguments = ["--scores", tmp_path / "scores.jsonl", "--data", path, "--count", 2, "-o", tmp_path / "subset.jsonl"]
    run_cli("select", *arguments, "--plain")
    assert read_records(Source("subset", tmp_path / "subset.jsonl")) == [records[4], records[3]]
    shown = json.loads(run_cli("inspect", path, "--json", check=False).stdout)
    assert (shown["facts"]["rows"], shown["facts"]["dropped"]) == (5, {"no response": 1})
