from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataflex.data.catalog import find_sources
from dataflex.data.hub import HubDataset
from dataflex.data.records import Columns, Tags
from dataflex.errors import UsageError

ALPACA = [{"instruction": "a", "output": "b"}]


def test_demo_entries(data_dir: Path) -> None:
    alpaca, glaive = find_sources(["alpaca_en_demo", "glaive_toolcall_en_demo"], data_dir)
    assert (alpaca.formatting, alpaca.columns, alpaca.path) == ("alpaca", Columns(), data_dir / "alpaca_en_demo.json")
    assert (glaive.formatting, glaive.columns.messages, glaive.columns.tools) == ("sharegpt", "conversations", "tools")
    assert glaive.tags == Tags()


def test_given_columns_and_tags_unset_what_they_do_not_list(tmp_path: Path, write_dataset) -> None:
    write_dataset("a", ALPACA, columns={"prompt": "instruction", "response": "output"})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    write_dataset("b", [{"messages": []}], formatting="sharegpt", columns={"messages": "messages"}, tags=tags)
    a, b = find_sources(["a", "b"], tmp_path)
    assert a.columns == Columns("instruction", None, "output", None, None, None, None)
    assert b.tags == Tags("role", "content", "user", "assistant", None, None, None)


@pytest.mark.parametrize(
    ("record", "formatting"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"instruction": "", "messages": []}, "messages"),
    ],
)
def test_a_file_is_recognised_by_its_fields(tmp_path: Path, record: dict, formatting: str) -> None:
    path = tmp_path / "subset.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (source,) = find_sources([str(path)], tmp_path / "no such folder")
    assert (source.formatting, source.path) == (formatting, path)
    assert source.columns.system == "system"


def test_an_absolute_file_name_may_lie_anywhere(tmp_path: Path, write_dataset) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(ALPACA))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"a": {"file_name": str(outside)}}))
    assert find_sources(["a"], folder)[0].path == outside
    (folder / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "../outside.json"}}))
    with pytest.raises(UsageError, match="leads out of"):
        find_sources(["a"], folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ms_hub_url": "x/y"}, "ms_hub_url is not supported .*give hf_hub_url, or download it and give file_name"),
        ({"om_hub_url": "x/y", "file_name": "a.json"}, "om_hub_url is not supported"),
        ({"script_url": "x"}, "script_url is not supported"),
        ({"hf_hub_url": "x/y", "subset": 3}, "subset is 3; expected a text"),
        ({"file_name": "a.json", "split": ["train"]}, "split is .*expected a text"),
        ({"file_name": "mixed"}, "of several kinds"),
        ({}, "file_name is missing"),
        ({"file_name": "gone.json"}, "no file .*gone.json"),
        ({"file_name": "a.json", "ranking": True}, "ranking data"),
        ({"file_name": "a.json", "columns": {"images": "images"}}, "column 'images' is not supported"),
        ({"file_name": "a.json", "columns": {"kto_tag": "label"}}, "column 'kto_tag' is not supported"),
        ({"file_name": "a.json", "columns": ["a"]}, "columns should map"),
        ({"file_name": "a.json", "columns": {"prompt": 1}}, "columns should map"),
        ({"file_name": "a.json", "formatting": "shareGPT"}, "formatting 'shareGPT' is unknown; expected alpaca"),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"tools": "t"}}, "columns leave out messages"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {}}, "tags must give role_tag"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples is 0"),
        ({"file_name": "a.json", "num_samples": True}, "num_samples is True"),
        ({"file_name": "dataset_info.xml"}, "unknown kind"),
        ("a.json", "expected an object, found str"),
    ],
)
def test_an_entry_that_cannot_be_used_says_why(tmp_path: Path, entry: object, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "dataset_info.xml").write_text("")
    (tmp_path / "mixed").mkdir()
    for name in ("a.json", "b.jsonl", "c.csv"):
        (tmp_path / "mixed" / name).write_text("")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(UsageError, match=message) as error:
        find_sources(["a"], tmp_path)
    assert "dataset_info.json, dataset 'a'" in str(error.value)


def test_a_name_that_leads_nowhere(tmp_path: Path, write_dataset) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_sources(["a"], tmp_path / "gone")
    with pytest.raises(UsageError, match=r"dataset_info\.json: No such file"):
        find_sources(["a"], tmp_path)
    write_dataset("alpaca", ALPACA)
    with pytest.raises(UsageError, match=r"it has 1 entry, and the files of alpaca;.*did you mean 'alpaca'"):
        find_sources(["alpca"], tmp_path)
    with pytest.raises(UsageError, match=r"'gone\.jsonl': no such file"):
        find_sources(["gone.jsonl"], tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        find_sources(["alpaca"], tmp_path)


@pytest.mark.parametrize(("text", "found"), [('[{"text": "x"}]', "has text"), ("[]", "it is empty")])
def test_a_file_of_unknown_fields(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=f"{found}; expected a field named messages, conversations or instruction"):
        find_sources([str(tmp_path / "x.json")], tmp_path)


def test_the_hub_goes_before_a_file(tmp_path: Path) -> None:
    entry = {
        "hf_hub_url": "x/y",
        "ms_hub_url": "x/y",
        "file_name": "a.json",
        "subset": "s",
        "folder": "f",
        "split": "t",
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    (source,) = find_sources(["a"], tmp_path)
    assert (source.hub, source.split, source.path) == (HubDataset("x/y", "s", "f"), "t", None)


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        (
            [{"Q": "a", "answer": "b"}] * 2,
            {"prompt": "q", "response": "answer"},
            "'q' is in no record; did you mean 'Q'",
        ),
        ([{"answer": "b"}, {"more": 1}], {"prompt": "q", "response": "answer"}, "fields there are: 'answer', 'more'"),
        ([{"answer": "b"}, {"q": "a"}], {"prompt": "q", "response": "answer"}, None),
        ([{"q": None, "answer": "b"}], {"prompt": "q", "response": "answer"}, None),
        ([{"answer": "b"}], None, None),
    ],
)
def test_a_named_column_is_in_some_record(
    tmp_path: Path, write_dataset, records: list[dict], columns: dict | None, message: str | None
) -> None:
    write_dataset("a", records, **({"columns": columns} if columns else {}))
    if message is None:
        find_sources(["a"], tmp_path)
        return
    with pytest.raises(UsageError, match=f"dataset_info.json, dataset 'a': column .*{message}"):
        find_sources(["a"], tmp_path)


@pytest.mark.parametrize("text", ["", " \n", "[]", "\ufeff"])
def test_a_dataset_without_a_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.jsonl"}}))
    with pytest.raises(UsageError, match=r"dataset_info\.json, dataset 'a': .*a\.jsonl is empty; fill it"):
        find_sources(["a"], tmp_path)
    with pytest.raises(UsageError, match=r"a\.jsonl: it is empty"):
        find_sources([str(tmp_path / "a.jsonl")], tmp_path)
