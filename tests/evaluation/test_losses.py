"""Held-out losses against transformers' own, a row at a time; killed and resumed; by two processes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.config import RunConfig
from dataflex.errors import UsageError
from dataflex.evaluation.figures import figures_of
from dataflex.progress import SilentTask


@pytest.fixture(scope="module")
def config(tiny_run: dict) -> RunConfig:
    data = {"held_out": "alpaca_en_demo,identity", "eval_dataset": None, "max_samples": 9, "max_new_tokens": 6,
        "dataset": "glaive_toolcall_en_demo"}  # fmt: skip
    return dataflex.load_config(options={**tiny_run, **data})


@pytest.fixture(scope="module")
def adapter(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    options = {"eval_dataset": None, "output_dir": str(tmp_path_factory.mktemp("warm")), "warmup_step": 2}
    return str(dataflex.warmup(config.changed(**options)))


def rows_of(config: RunConfig, folder: Path, name: str = "eval", **changes: Any) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    dataflex.evaluate(config.changed(output=str(folder / f"{name}.json"), rows=str(path), **changes))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("adapted", [False, True])
def test_losses_are_those_of_rows_alone_in_float64(
    config: RunConfig, adapter: str, adapted: bool, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    if adapted:
        model = PeftModel.from_pretrained(model, adapter)
    model = model.double().eval()
    examples = dataflex.load_examples(config.changed(eval_dataset=config.held_out), "eval")
    expected = [
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        for row in examples
    ]
    rows = rows_of(config, tmp_path, adapter_name_or_path=[adapter] if adapted else None)
    assert [row["row"] for row in rows] == [example.row for example in examples]
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5)

    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    tokens = [row["tokens"] for row in rows]
    assert found["perplexity"] == pytest.approx(np.exp(np.dot(expected, tokens) / sum(tokens)), rel=1e-5)
    for name in ("alpaca_en_demo", "identity"):
        part = [loss for loss, row in zip(expected, rows, strict=True) if row["dataset"] == name]
        assert found["datasets"][name]["loss"] == pytest.approx(np.mean(part), rel=1e-5)
    assert found["fingerprints"].keys() == {"held-out data", "base_model", "adapter"}
    assert (found["fingerprints"]["adapter"] is None) is not adapted
    assert not (tmp_path / "eval.json.partial").exists()


class Killed(Exception):
    pass


class Kills(SilentTask):
    """A Progress that ends the command after one batch."""

    def __init__(self) -> None:
        self.amounts: list[int] = []

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str, *expected: Any) -> Any:
        self.losses = description == "held-out loss"
        yield self

    def advance(self, amount: int = 1, **shown: float) -> None:
        if self.losses:
            self.amounts.append(amount)
            if len(self.amounts) == 3:
                raise Killed

    def say(self, message: str) -> None:
        pass


def test_a_killed_evaluation_goes_on_to_the_same_bytes(config: RunConfig, adapter: str, tmp_path: Path) -> None:
    rows_of(config, tmp_path, "whole")
    killed = config.changed(output=str(tmp_path / "eval.json"), rows=str(tmp_path / "eval.jsonl"))
    with pytest.raises(Killed):
        dataflex.evaluate(killed, Kills())
    log = tmp_path / "eval.json.partial"
    with open(log, "a") as handle:
        handle.write('{"index": 3, "lo')  # a line that was cut off
    (tmp_path / "eval.jsonl").write_text("of a command that was killed while it wrote")
    with pytest.raises(UsageError, match="another evaluation: adapter"):
        dataflex.evaluate(killed.changed(adapter_name_or_path=[adapter]))
    rows_of(config, tmp_path)
    for kind in ("json", "jsonl"):
        assert (tmp_path / f"eval.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_two_processes_find_what_one_finds(config: RunConfig, tmp_path: Path, run_cli) -> None:
    rows_of(config, tmp_path, "one")
    keys = (
        "model_name_or_path",
        "dataset_dir",
        "template",
        "cutoff_len",
        "max_samples",
        "token_budget",
        "max_new_tokens",
    )
    typed = [f"{key}={getattr(config, key)}" for key in keys]
    files = ["-o", tmp_path / "two.json", "--rows", tmp_path / "two.jsonl"]
    run_cli("eval", "--held-out", "alpaca_en_demo,identity", *typed, *files, "--nproc", 2, "-q")
    for kind in ("json", "jsonl"):
        assert (tmp_path / f"two.{kind}").read_bytes() == (tmp_path / f"one.{kind}").read_bytes()


def test_figures_weigh_rows_and_tokens() -> None:
    found = figures_of(
        np.array([1.0, 3.0]), np.array([3, 1]), {"exact": np.array([1.0, 0.0]), "math": np.array([1.0, np.nan])}
    )
    assert (found["loss"], found["token_loss"], found["rows"], found["tokens"]) == (2.0, 1.5, 2, 4)
    assert (found["exact"], found["math"]) == (0.5, 1.0)
    assert found["perplexity"] == pytest.approx(np.exp(1.5))


def test_figures_and_rows_are_two_files(config: RunConfig, tmp_path: Path) -> None:
    path = str(tmp_path / "eval.json")
    with pytest.raises(UsageError, match="output and rows both name"):
        dataflex.evaluate(config.changed(output=path, rows=path))
    assert not list(tmp_path.iterdir())
