"""A tokenizer to spoil, and a folder of datasets to write."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _loaded_tokenizer(model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def tokenizer(_loaded_tokenizer):
    """SmolLM2's tokenizer, a test's own: templates change it."""
    return copy.deepcopy(_loaded_tokenizer)


@pytest.fixture(autouse=True)
def row_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test; returns its folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "dataflex"


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """`write_dataset(name, records, **entry)` adds a file and its entry; returns the file."""

    def write(name: str, records: list[object], **entry: object) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        info_path = tmp_path / "dataset_info.json"
        info = json.loads(info_path.read_text()) if info_path.exists() else {}
        info[name] = {"file_name": path.name, **entry}
        info_path.write_text(json.dumps(info), encoding="utf-8")
        return path

    return write
