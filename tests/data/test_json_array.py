from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflex.data import json_array
from dataflex.data.json_array import iter_array


@pytest.fixture(autouse=True, params=[1, 3, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_array, "CHUNK", request.param)
    return request.param


def items(path: Path, text: str) -> Iterator[object]:
    path.write_text(text, encoding="utf-8")
    return iter_array(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_items_of_any_type_stay_what_they_are(tmp_path: Path, indent: int | None) -> None:
    rows = [{"a": 1}, {"a": "x", "b": [None, {"c": ']}\\"ü'}]}, {}, {"a": 1.5e3, "é": True}]
    for ascii in (True, False):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
        assert list(items(tmp_path / "a.json", text)) == rows
        assert list(items(tmp_path / "a.json", f"\ufeff \n{text}\n ")) == rows


@pytest.mark.parametrize(("text", "found"), [("[]", []), (" [ ] ", []), ('{"a": [1]}', [{"a": [1]}])])
def test_empty_and_alone(tmp_path: Path, text: str, found: list) -> None:
    assert list(items(tmp_path / "a.json", text)) == found


@pytest.mark.parametrize(
    "text",
    ["", "[", '[{"a": 1}', '[{"a": 1},]', '[{"a": 1}]x', '[{"a": 1} {"b": 2}]', "[{]", "nonsense", '[{"a": \n tru}]'],
)
def test_errors_are_those_of_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    with pytest.raises(ValueError) as error:
        list(items(tmp_path / "a.json", text))
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(("text", "kind"), [('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_neither_array_nor_object(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(TypeError, match=kind):
        list(items(tmp_path / "a.json", text))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    rows = items(tmp_path / "a.json", "[" + ", ".join(['{"a": 1}'] * 500_000) + ", broken]")
    assert next(rows) == {"a": 1}
    assert len(rows.gi_frame.f_locals["window"].text) < 2 << 20
