"""A `dynamic` run that is stopped anywhere and started again ends as one that never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dataflex import dynamic, load_config, train
from dataflex.errors import UsageError
from dataflex.gradients import capture, passes
from dataflex.progress import SilentTask


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopsAt:
    """A Progress that ends the run after so many reports of one kind of work."""

    def __init__(self, description: str, reports: int) -> None:
        self.description, self.left = description, reports

    @contextlib.contextmanager
    def task(self, description, total, unit, *expected):
        self.current = description
        yield _Task(self, description)

    def say(self, message):
        pass


class _Task(SilentTask):
    def __init__(self, stops: StopsAt, description: str) -> None:
        self.stops, self.description = stops, description

    def advance(self, amount=1, **shown):
        if self.description == self.stops.description and amount:
            self.stops.left -= 1
            if self.stops.left == 0:
                raise Stopped


@pytest.fixture
def options(tiny_run: dict, tmp_path: Path) -> dict:
    target = shutil.copy(tiny_run["eval_dataset"], tmp_path / "target.jsonl")  # a test may change it
    return {
        **tiny_run,
        "eval_dataset": str(target),
        "lora_dropout": 0.1,  # so that the random state must be right, too
        "output_dir": str(tmp_path / "out"),
        "gradient_accumulation_steps": 2,
        "save_steps": 100,
    }


def outcome(folder: Path) -> tuple[dict, dict, list]:
    picks = {path.name: path.read_text() for path in (folder / "selections").glob("step-*.jsonl")}
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return (
        load_file(folder / "adapter_model.safetensors"),
        picks,
        [(line["current_steps"], line["loss"]) for line in log],
    )


def assert_same(one: tuple, other: tuple) -> None:
    assert one[1] == other[1]
    assert one[2] == other[2]
    for name in one[0]:
        np.testing.assert_allclose(one[0][name], other[0][name], rtol=0, atol=1e-6)


@pytest.fixture
def whole(options, tmp_path) -> tuple:
    return outcome(dynamic(load_config(options={**options, "output_dir": str(tmp_path / "whole")})))


@pytest.mark.parametrize(
    ("work", "reports"),
    [
        ("training", 2),  # in the warm-up, before any checkpoint
        ("eval gradients", 1),  # inside the first selection
        ("train gradients", 3),
        ("train gradients", 12),  # inside the second
        ("training", 4),  # between the two
        ("training", 7),  # at the last step
    ],
)
def test_stopped_and_started_again(options, whole, work, reports):
    with pytest.raises(Stopped):
        dynamic(load_config(options=options), StopsAt(work, reports))
    assert_same(whole, outcome(dynamic(load_config(options=options))))


def test_a_selection_goes_on_from_its_committed_rows(options):
    settings = {**options, "cache_dir": options["output_dir"] + "-cache"}
    with pytest.raises(Stopped):
        dynamic(load_config(options=settings), StopsAt("train gradients", 3))
    counted = StopsAt("train gradients", 10**6)
    dynamic(load_config(options=settings), counted)
    batches_of_two_selections = 10**6 - counted.left
    again = StopsAt("train gradients", 10**6)
    dynamic(load_config(options={**settings, "overwrite": True}), again)
    # without the batches committed before it stopped
    assert batches_of_two_selections == (10**6 - again.left) - 3


def test_the_batches_stay_those_of_the_first_start(options, monkeypatch):
    """Free memory is not what it was; the token budget that followed from it is."""
    left_out = {key: value for key, value in options.items() if key != "token_budget"}
    config = load_config(options={**left_out, "proj_dim": None})
    monkeypatch.setattr(capture, "free_memory", lambda place: 2**40)
    with pytest.raises(Stopped):
        dynamic(config, StopsAt("train gradients", 1))
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["token_budget"] == 2048
    monkeypatch.setattr(capture, "free_memory", lambda place: 2**20)
    budgets = []
    cut = passes.token_batches
    monkeypatch.setattr(passes, "token_batches", lambda lengths, budget: budgets.append(budget) or cut(lengths, budget))
    dynamic(config)
    assert set(budgets) == {2048}


def test_a_finished_run_says_so_and_does_nothing(options):
    folder = dynamic(load_config(options=options))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = StopsAt("training", 1)
    said.say = lines = []
    said.say = lines.append
    dynamic(load_config(options=options), said)
    assert any("finished" in line for line in lines)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate \(0\.003 then, 0\.001 now\)"),
        ({"cutoff_len": 65}, "cutoff_len"),
        ({"adam_formula": "less"}, "adam_formula"),
        ({"max_samples": 23}, "max_samples"),
    ],
)
def test_another_run_is_not_gone_on_with(options, change, words):
    with pytest.raises(Stopped):
        dynamic(load_config(options=options), StopsAt("training", 4))
    with pytest.raises(UsageError, match=f"another run, which differs in .*{words}.*--overwrite"):
        dynamic(load_config(options={**options, **change}))
    dynamic(load_config(options={**options, **change, "overwrite": True}))


def test_changed_data_is_another_run(options, tmp_path):
    with pytest.raises(Stopped):
        dynamic(load_config(options=options), StopsAt("training", 4))
    (tmp_path / "target.jsonl").write_text(json.dumps({"instruction": "a", "output": "b c d"}) + "\n")
    with pytest.raises(UsageError, match="differs in eval_dataset: data files"):
        dynamic(load_config(options=options))


def test_what_is_not_a_run_is_not_overwritten(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is not empty; give --overwrite"):
        dynamic(load_config(options=options))
    dynamic(load_config(options={**options, "overwrite": True}))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_train_goes_on_too(options, tmp_path):
    settings = {**options, "save_steps": 2, "num_train_epochs": 1.0}
    config = load_config(options={**settings, "output_dir": str(tmp_path / "whole")})
    wanted = load_file(train(config) / "adapter_model.safetensors")
    with pytest.raises(Stopped):
        train(load_config(options=settings), StopsAt("training", 5))
    found = load_file(train(load_config(options=settings)) / "adapter_model.safetensors")
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6)


def test_killed_at_random_moments(options, whole, tmp_path):
    """The real process and a real SIGKILL, again and again, until it gets through."""
    arguments = [f"{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "dataflex", "dynamic", "--quiet", *arguments]
    started = time.monotonic()
    subprocess.run([*command, f"output_dir={tmp_path / 'timed'}"], stdout=subprocess.DEVNULL, check=True)
    once = time.monotonic() - started
    generator = random.Random(5)
    kills = 0
    while kills < 6:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
        deadline = time.monotonic() + generator.uniform(0.5, 0.95) * once
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        if kills:
            break
        once /= 2  # the machine was slower while the run was timed; once more, sooner
        shutil.rmtree(tmp_path / "out")
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert_same(whole, outcome(tmp_path / "out"))
