from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataflex.data.catalog import find_sources
from dataflex.data.hub import HubDataset
from dataflex.data.records import Source, count_records, data_hash, read_records
from dataflex.errors import UsageError

ROWS = [{"instruction": str(number), "output": "x"} for number in range(10)]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What load_dataset takes for a repository: files by split, in a folder."""
    folder = tmp_path / "repository" / "inner"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return folder.parent


def test_folder_and_split(repository: Path) -> None:
    hub = HubDataset(str(repository), folder="inner")
    assert read_records(Source("h", None, hub=hub)) == ROWS
    part, test = (Source("h", None, hub=hub, split=split) for split in ("train[2:4]", "test"))
    assert read_records(part) == ROWS[2:4]
    assert (count_records(part), count_records(test)) == (2, 1)
    assert data_hash([part]) != data_hash([test]) == data_hash([Source("other", None, hub=hub, split="train[:1]")])


@pytest.mark.parametrize(("subset", "split"), [("gone", "train"), (None, "gone")])
def test_what_a_repository_lacks(repository: Path, subset: str | None, split: str) -> None:
    with pytest.raises(UsageError, match="cannot be loaded from the hub or its cache"):
        read_records(Source("h", None, hub=HubDataset(str(repository), subset, "inner"), split=split))


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(UsageError, match=r"nobody/nothing.*check the name and the network, or download"):
        read_records(Source("h", None, hub=HubDataset("nobody/nothing")))


def test_a_named_column_and_null_fillings_are_as_in_a_file(repository: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    for split in ("train", "test"):
        (repository / "inner" / f"{split}.jsonl").write_text(json.dumps({"chat": turns}) + "\n")
    columns = {"messages": "chat", "tools": "tools"}
    entry = {"hf_hub_url": str(repository), "folder": "inner", "split": "test", "formatting": "openai"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"h": {**entry, "columns": columns}}))
    (source,) = find_sources(["h"], tmp_path)
    with pytest.raises(UsageError, match=r"dataset_info\.json, dataset 'h': column 'tools' is in no record.*: 'chat'"):
        count_records(source)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"h": {**entry, "columns": {"messages": "chat"}}}))
    assert read_records(*find_sources(["h"], tmp_path)) == [{"chat": turns}]
