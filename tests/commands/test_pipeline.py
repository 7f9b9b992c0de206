"""The commands one after the other, each in a process of its own, as the README's pipeline runs them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dataflex import load_config, load_examples, open_store
from dataflex.model import load_adapter, load_base_model

STEPS = {
    "warmup": "warmup run.yaml output_dir=saves/warmup",
    "train 2": "grads run.yaml --checkpoint saves/warmup/checkpoint-2 -o saves/train-2.h5",
    "train 4": "grads run.yaml --checkpoint saves/warmup/checkpoint-4 -o saves/train-4.h5 --json",
    "eval 2": "grads run.yaml --checkpoint saves/warmup/checkpoint-2 --split eval -o saves/eval-2.h5 -q",
    "eval 4": "grads run.yaml --checkpoint saves/warmup/checkpoint-4 --split eval -o saves/eval-4.h5",
    "score": "score --train saves/train-2.h5 --eval saves/eval-2.h5 --train saves/train-4.h5 --eval saves/eval-4.h5 "
    "-o saves/scores.jsonl",
    "select": "select run.yaml --scores saves/scores.jsonl --top 0.5 -o saves/subset.jsonl --json",
    "train": "train run.yaml --dataset saves/subset.jsonl output_dir=saves/selected --json",
    "merge": "merge run.yaml --adapter saves/selected --export-dir saves/merged",
}
WRITES = {
    "warmup": "saves/warmup/checkpoint-4",
    "train 2": "saves/train-2.h5",
    "train 4": "saves/train-4.h5",
    "eval 2": "saves/eval-2.h5",
    "eval 4": "saves/eval-4.h5",
    "score": "saves/scores.jsonl",
    "select": "saves/subset.jsonl",
    "train": "saves/selected",
    "merge": "saves/merged",
}


@dataclass(frozen=True)
class Pipeline:
    folder: Path
    done: dict[str, subprocess.CompletedProcess[str]]

    def path(self, step: str) -> Path:
        return self.folder / WRITES[step]

    def lines(self, step: str) -> list[dict]:
        return [json.loads(line) for line in self.path(step).read_text().splitlines()]


@pytest.fixture(scope="module")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, write_run: Callable[[Path], None], run_cli: Callable[..., object]
) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    write_run(folder)
    return Pipeline(folder, {name: run_cli(*command.split(), cwd=folder) for name, command in STEPS.items()})


@pytest.mark.parametrize("step", STEPS)
def test_stdout_holds_the_result_and_nothing_else(pipeline: Pipeline, step: str):
    stdout = pipeline.done[step].stdout
    if "--json" in STEPS[step]:
        assert stdout.count("\n") == 1
        facts = json.loads(stdout)
        assert WRITES[step] in (facts.get("output"), facts.get("output_dir"))
    else:
        assert stdout == f"{WRITES[step]}\n"
    assert pipeline.path(step).exists()


def test_stderr_is_quiet_where_asked_and_free_of_the_libraries_chatter(pipeline: Pipeline):
    assert pipeline.done["eval 2"].stderr == ""
    assert "rows 12 dimensions 256" in " ".join(pipeline.done["train 2"].stderr.split())
    for step, done in pipeline.done.items():
        for chatter in ("it/s]", "accelerator", "Warning", "\x1b["):
            assert chatter not in done.stderr, (step, done.stderr)


def test_scores_are_the_learning_rate_weighted_sum_over_checkpoints(pipeline: Pipeline):
    expected, rates = 0, []
    for step in (2, 4):
        with (
            open_store(pipeline.path(f"train {step}")) as train,
            open_store(pipeline.path(f"eval {step}")) as validation,
        ):
            assert (train.manifest["step"], len(train), len(validation)) == (step, 12, 4)
            rate = train.manifest["learning_rate"]
            expected = expected + rate * (train[:].astype(np.float64) @ validation[:].astype(np.float64).T).mean(axis=1)
            rates.append(rate)
    assert rates[0] > rates[1] > 0  # the weights matter
    scores = pipeline.lines("score")
    assert [record["row"] for record in scores] == list(range(12))
    assert [record["dataset"] for record in scores] == ["alpaca"] * 6 + ["identity"] * 6
    np.testing.assert_allclose([record["score"] for record in scores], expected / sum(rates), rtol=1e-5)


def test_the_subset_is_the_best_rows_as_they_stand_in_their_source(pipeline: Pipeline):
    source = [
        record
        for name in ("alpaca", "identity")
        for record in json.loads((pipeline.folder / "data" / f"{name}.json").read_text())
    ]
    scores = {record["row"]: record["score"] for record in pipeline.lines("score")}
    best = sorted(scores, key=lambda row: (-scores[row], row))[:6]
    subset = pipeline.lines("select")
    assert [record.pop("dataflex") for record in subset] == [{"row": row, "score": scores[row]} for row in best]
    assert subset == [source[row] for row in best]


def test_training_on_the_subset_sees_its_rows(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pipeline.folder)
    whole = load_examples(load_config("run.yaml"))
    subset = load_examples(load_config("run.yaml", ["dataset=saves/subset.jsonl"]))
    rows = [record["dataflex"]["row"] for record in pipeline.lines("select")]
    by_row = {example.row: example for example in whole}
    assert [example.input_ids for example in subset] == [by_row[row].input_ids for row in rows]
    assert [example.labels for example in subset] == [by_row[row].labels for row in rows]


def test_the_merged_model_is_the_base_with_its_adapter(pipeline: Pipeline, tiny_model_dir: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(pipeline.path("merge")).eval()
    tokenizer = AutoTokenizer.from_pretrained(pipeline.path("merge"))
    config = load_config(overrides=[f"model_name_or_path={tiny_model_dir}"])
    adapted = load_adapter(load_base_model(config, torch.float32), pipeline.path("train"), config).eval()
    base = load_base_model(config, torch.float32).eval()
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs, before = (model.to(merged.dtype)(tokens).logits.float() for model in (merged, adapted, base))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[merged.dtype]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert (ours - before).abs().max() > 10 * tolerance  # the adapter does something


def test_exact_scores_equal_those_of_stores_without_projection(bench: Path, cli):
    checkpoints = [f"warmup/checkpoint-{step}" for step in (2, 4)]
    pairs = []
    for index, checkpoint in enumerate(checkpoints):
        for split in ("train", "eval"):
            output = f"{split}-{index}.h5"
            flags = ["--projector", "none", "--store-dtype", "float32", "--split"]
            assert cli("grads", "run.yaml", "--checkpoint", checkpoint, *flags, split, "-o", output).exit_code == 0
            pairs += [f"--{split}", output]
    assert cli("score", *pairs, "-o", "stored.jsonl").exit_code == 0
    given = [part for checkpoint in checkpoints for part in ("--checkpoint", checkpoint)]
    assert cli("score", "run.yaml", "--exact", *given, "-o", "exact.jsonl").exit_code == 0
    stored, exact = (
        [json.loads(line) for line in Path(name).read_text().splitlines()] for name in ("stored.jsonl", "exact.jsonl")
    )
    assert [one["row"] for one in stored] == [one["row"] for one in exact]
    np.testing.assert_allclose([one["score"] for one in stored], [one["score"] for one in exact], rtol=1e-4, atol=1e-6)
    assert len({one["score"] for one in exact}) == len(exact)


def test_train_leaves_a_config_that_runs_again(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pipeline.folder)
    config = load_config("saves/selected/config.yaml")
    assert config == load_config("run.yaml", ["dataset=saves/subset.jsonl", "output_dir=saves/selected"]).changed(
        selector="less", prompt_date=config.prompt_date
    )
