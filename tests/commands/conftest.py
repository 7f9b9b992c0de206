"""A small run to work on: real rows, the tiny model, and what each command makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import dataflex
from dataflex.commands.app import app
from dataflex.config_file import load_config

RUN = {
    "dataset": "alpaca,identity",
    "eval_dataset": "tools",
    "template": "qwen",
    "cutoff_len": 96,
    "lora_rank": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_steps": 2,
    "warmup_step": 4,
    "update_step": 2,
    "update_times": 1,
    "num_train_epochs": 1.0,
    "proj_dim": 256,
    "token_budget": 300,
}


@pytest.fixture(scope="session")
def write_run(tiny_model_dir: Path, data_dir: Path) -> Callable[[Path], None]:
    """Write run.yaml, and a data folder in which a few rows of each demo dataset lie."""

    def write(folder: Path) -> None:
        info = json.loads((data_dir / "dataset_info.json").read_text(encoding="utf-8"))
        entries = {}
        (folder / "data").mkdir()
        for name, source, rows in (
            ("alpaca", "alpaca_en_demo", slice(0, 6)),
            ("identity", "identity", slice(0, 6)),
            ("tools", "glaive_toolcall_en_demo", slice(10, 14)),
        ):
            records = json.loads((data_dir / info[source]["file_name"]).read_text(encoding="utf-8"))[rows]
            (folder / "data" / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
            entries[name] = {**info[source], "file_name": f"{name}.json"}
        (folder / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        keys = {"model_name_or_path": str(tiny_model_dir), **RUN}
        (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, tuple[int, int] | None]]:
    """Everything below a folder: size and time of change of its files."""

    def walk(folder: Path) -> dict[str, tuple[int, int] | None]:
        found: dict[str, tuple[int, int] | None] = {}
        for path in folder.rglob("*"):
            stat = path.stat()
            found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else None
        return found

    return walk


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[[Path], None]) -> Path:
    """run.yaml, data/, warmup/checkpoint-2 and -4, train.h5, eval.h5 and scores.jsonl, written by the library."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config("run.yaml")
        dataflex.warmup(config.changed(output_dir="warmup"))
        checkpoint = ["warmup/checkpoint-4"]
        dataflex.grads(config.changed(checkpoint=checkpoint, output="train.h5"))
        dataflex.grads(config.changed(checkpoint=checkpoint, output="eval.h5", split="eval"))
        dataflex.score(config.changed(train_stores=["train.h5"], eval_stores=["eval.h5"], output="scores.jsonl"))
    for path in (folder / "warmup").rglob("*"):
        if path.name in ("tokenizer.json", "optimizer.pt"):  # large, and nothing here reads them
            path.unlink()
    return folder


@pytest.fixture
def bench(_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run which a test may spoil; also the working directory."""
    folder = tmp_path / "bench"
    shutil.copytree(_made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATAFLEX_DEBUG", raising=False)
    return folder


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run `dataflex ARGS` in this process: quicker than `run_cli`, with stdout and stderr apart as well."""

    def run(*args: Any) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return run
