from __future__ import annotations

import base64
import datetime
import decimal
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex import json_text
from dataflex.errors import UsageError
from dataflex.files import read_jsonl, write_jsonl
from dataflex.json_text import iter_objects, json_line, json_of_figures


@pytest.fixture(autouse=True, params=[1, 3, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_text, "CHUNK", request.param)
    return request.param


def objects(text: str) -> list[dict]:
    return list(iter_objects(io.StringIO(text), "file"))


ROWS = [{"a": 1}, {"a": "x", "b": [None, {"c": ']}\\"ü'}]}, {}, {"a": -1.5e3, "é": True}]
LAYOUTS = {
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "blank and space-only lines": lambda rows: "\n\n \t\n\u00a0\n".join(map(json.dumps, rows)) + "\n\n  ",
    "array": json.dumps,
    "indented array": lambda rows: f" \n{json.dumps(rows, indent=2)}\n ",
    "objects that follow each other": lambda rows: "".join(json.dumps(row, indent=1) for row in rows),
    "arrays that follow each other": lambda rows: json.dumps(rows[:2]) + "[]" + json.dumps(rows[2:]),
    "an array after lines": lambda rows: json.dumps(rows[0]) + "\n" + json.dumps(rows[1:]),
    "joined files, each with its mark": lambda rows: "\n\ufeff".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_in_any_layout(layout: str) -> None:
    assert objects(LAYOUTS[layout](ROWS)) == ROWS


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] ", "[][]"])
def test_no_objects(text: str) -> None:
    assert objects(text) == []


def test_nan_is_null_and_infinity_is_a_number() -> None:
    assert objects('{"a": NaN, "b": [NaN, -Infinity]}') == [{"a": None, "b": [None, float("-inf")]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "file, line 1: not JSON"),
        ('[{"a": 1}', "line 1: not JSON .the array is not closed"),
        ('[{"a": 1},]', "line 1: not JSON"),
        ('[{"a": 1}]x', "line 1: not JSON"),
        ('[{"a": 1} {"b": 2}]', "line 1: not JSON"),
        ("[{]", "line 1: not JSON"),
        ("nonsense", "line 1: not JSON"),
        ('{"a": 1}\n\n{"a": \n tru}', "line 4: not JSON"),
        ('{"a": 1}\n{"a": "x\n{"a": 2}', "line 2: not JSON .Invalid control character"),
        ('{"a": 1}\n{"a": "x', "line 2: not JSON .Unterminated string"),
        ('{"a": 1', "line 1: not JSON"),
        ('{"a": 1}\n{"a": 1,\n\n', "line 2: not JSON"),
        ('"text"', "line 1: expected an object, found str .row 0"),
        ('{"a": 1}\n3', "line 2: expected an object, found int .row 1"),
        ('[{"a": 1},\nnull]', "row 1: expected an object, found null .line 2"),
        ("[" * 100_000, "line 1.*: (nested too deeply|not JSON|expected an object)"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objects(text)


def test_only_what_is_asked_for_is_read() -> None:
    text = io.StringIO("[" + ", ".join(['{"a": 1}'] * 500_000) + ", broken]")
    assert next(iter_objects(text, "file")) == {"a": 1}
    assert text.tell() <= json_text.CHUNK + 10


def test_a_file_that_is_wrong_early_is_not_read_to_its_end(chunk: int) -> None:
    text = io.StringIO('{"a": 1}\n{"a": 1\n' + '{"a": 1}\n' * 500_000)
    with pytest.raises(UsageError, match="line 3: not JSON"):  # where the comma should be
        list(iter_objects(text, "file"))
    assert text.tell() <= 2 * max(chunk, 100)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4), layout=st.sampled_from(list(LAYOUTS)))
def test_whatever_json_writes_is_read(rows: list[dict], layout: str) -> None:
    assert objects(LAYOUTS[layout](rows) if rows else "") == rows


@given(record=st.dictionaries(st.text(), JSON | st.characters(categories=["Cs"]), max_size=4))
def test_a_line_is_utf8_without_line_breaks_and_reads_back(record: dict) -> None:
    line = json_line(record)
    assert "\n" not in line
    assert json.loads(line.encode().decode()) == record


@pytest.mark.parametrize(
    ("value", "text", "undo"),
    [
        (datetime.date(2026, 1, 2), "2026-01-02", datetime.date.fromisoformat),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006", datetime.datetime.fromisoformat),
        (datetime.time(3, 4), "03:04:00", datetime.time.fromisoformat),
        (decimal.Decimal("1.10"), "1.10", decimal.Decimal),
        (b"\x00\xff", "AP8=", base64.b64decode),
    ],
)
def test_what_json_lacks_is_a_text_that_can_be_undone(value: object, text: str, undo) -> None:
    assert json.loads(json_line({"a": [value]})) == {"a": [text]}
    assert undo(text) == value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1, "b": [{"c": float("nan")}]}, r"record 1: b\[0\]\.c is nan, which JSON cannot hold"),
        ({"a": float("-inf")}, "record 1: a is -inf"),
        ({"a": {"b": {1, 2}}}, r"record 1: a\.b is of type set"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path: Path, record: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_jsonl(tmp_path / "a.jsonl", [{}, record])
    assert list(tmp_path.iterdir()) == []


def test_files_are_read_past_a_byte_order_mark_and_whatever_ends_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for end in ("\n", "\r", "\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + end.join(map(json.dumps, ROWS)).encode())
        assert list(read_jsonl(path, "file")) == ROWS
    path.write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(UsageError, match=r"a\.jsonl: not UTF-8 text .*; save it as UTF-8"):
        list(read_jsonl(path, "file"))


FIGURES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(FIGURES)
def test_figures_are_json_whatever_they_are(figures: object) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(json_of_figures(figures), parse_constant=refuse)
    if "nan" not in repr(figures) and "inf" not in repr(figures):
        assert read == figures
    assert json_of_figures({"loss": [float("nan"), 1.5, -float("inf")]}) == '{"loss": [null, 1.5, null]}'
