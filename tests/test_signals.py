"""SIGINT and SIGTERM: the batch or the step in hand is committed, what is kept is said, and nothing is done twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import typer
from safetensors.torch import load_file

from dataflex import dynamic, grads, load_config, warmup
from dataflex.commands.session import session
from dataflex.commands.signals import NOTICE, stoppable
from dataflex.progress import Interrupted, SilentTask


@pytest.fixture(scope="module")
def settings(tiny_run: dict) -> dict:
    return {**tiny_run, "lora_dropout": 0.1, "gradient_accumulation_steps": 2, "token_budget": 100}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    return dynamic(load_config(options={**settings, "output_dir": str(tmp_path_factory.mktemp("whole") / "out")}))


class InterruptsAt(SilentTask):
    """A Progress that asks for an end at the n-th report of one kind of work, and only there."""

    def __init__(self, description: str, report: int) -> None:
        self.description, self.left = description, report

    @contextlib.contextmanager
    def task(self, description, total, unit, *expected):
        self.current = description
        yield self if description == self.description else InterruptsAt("nothing", 0)

    def advance(self, amount=1, **shown):
        self.left -= bool(amount)
        if amount and self.left == 0:
            raise Interrupted(143)

    def say(self, message):
        pass


def assert_same_end(folder: Path, whole: Path) -> None:
    for step in (3, 5):
        name = Path("selections") / f"step-{step}.jsonl"
        assert (folder / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, whole))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
    ours, theirs = ((f / "trainer_log.jsonl").read_text().splitlines() for f in (folder, whole))
    assert [json.loads(line)["loss"] for line in ours] == [json.loads(line)["loss"] for line in theirs]


@pytest.mark.parametrize(("step", "more"), [(1, {}), (4, {"save_only_model": True, "save_strategy": "no"}), (7, {})])
def test_the_step_in_hand_is_saved_and_gone_on_from(settings, whole, tmp_path, step, more):
    options = {**settings, "output_dir": str(tmp_path / "out")}
    with pytest.raises(Interrupted) as stop:
        dynamic(load_config(options={**options, **more}), InterruptsAt("training", step))
    assert stop.value.exit_code == 143
    assert stop.value.__notes__ == [f"step {step} of 7 is saved in {tmp_path}/out/checkpoint-{step}"]
    again = InterruptsAt("training", 10**6)
    dynamic(load_config(options={**options, **more}), again)
    assert 10**6 - again.left == 7 - step  # what was done is not done again
    assert_same_end(tmp_path / "out", whole)


def test_an_interrupted_selection_says_what_it_keeps(settings, whole, tmp_path):
    cache = tmp_path / "cache"
    options = {**settings, "output_dir": str(tmp_path / "out"), "cache_dir": str(cache)}
    with pytest.raises(Interrupted) as stop:
        dynamic(load_config(options=options), InterruptsAt("train gradients", 2))
    with h5py.File(cache / "step-3" / "train.h5") as store:
        rows = int(store["done"][:].sum())
    assert 0 < rows < 24
    assert stop.value.__notes__ == [
        f"{rows} of 24 rows are committed in {cache}/step-3/train.h5",
        f"step 3 of 7 is saved in {tmp_path}/out/checkpoint-3",
    ]
    dynamic(load_config(options=options))
    assert_same_end(tmp_path / "out", whole)


IN_A_LONG_CALL = """
import hashlib
from dataflex.commands.console import Console
from dataflex.commands.signals import stoppable

console = Console()
with stoppable(console), console.task("rows", 1, "rows") as task:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # a call of seconds that no handler can interrupt
    print("ended", flush=True)
    task.advance()
"""


def test_a_signal_is_answered_within_a_long_call():
    """As a backward pass is; seconds pass between the answer and the call's end."""
    command = [sys.executable, "-c", IN_A_LONG_CALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.5)  # until it is within the call
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() + process.stdout.readline() == NOTICE
    assert not select.select([process.stdout], [], [], 1.0)[0]
    assert process.stdout.readline() == b"ended\n"
    process.communicate()


def test_before_the_first_step_nothing_is_kept(settings, tmp_path):
    config = load_config(options={**settings, "output_dir": str(tmp_path / "out")})
    with pytest.raises(Interrupted) as stop:
        dynamic(config, InterruptsAt("eval loss before", 1))
    assert stop.value.__notes__ == ["step 0 of 7, no checkpoint yet"]


class FakeConsole:
    quiet = True

    def __init__(self, tasks_open: int) -> None:
        self.tasks_open, self.stop_code = tasks_open, 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_a_commit_and_the_second_does_not(number, code):
    console = FakeConsole(tasks_open=1)
    with pytest.raises(Interrupted) as stop, stoppable(console):
        signal.raise_signal(number)
        assert console.stop_code == code
        signal.raise_signal(number)
        pytest.fail("the second signal did not stop it")
    assert stop.value.exit_code == code


def test_a_signal_with_nothing_under_way_stops_at_once():
    with pytest.raises(Interrupted), stoppable(FakeConsole(tasks_open=0)):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")


def test_a_launcher_that_repeats_itself_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console = FakeConsole(tasks_open=1)
    with stoppable(console):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert console.stop_code == 143


def test_a_forked_helper_ends_at_once():
    with stoppable(FakeConsole(tasks_open=1)):
        helper = os.fork()
        if helper == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(helper, signal.SIGTERM)
        _, status = os.waitpid(helper, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_a_task_raises_only_for_work_that_is_done(capsys):
    with (
        pytest.raises(typer.Exit) as end,
        session(None, {}, as_json=False, quiet=True) as running,
        running.console.task("work", 3, "rows") as task,
    ):
        task.advance(1)
        signal.raise_signal(signal.SIGINT)
        task.advance(0, loss=1.0)
        with contextlib.suppress(Exception):  # it is no failure
            task.advance(1)
        pytest.fail("it went on")
    assert end.value.exit_code == 130
    assert "interrupted: nothing new was committed" in capsys.readouterr().err


def test_the_command_to_go_on_with_does_not_start_afresh(monkeypatch, capsys):
    arguments = ["grads", "my run.yaml", "--overwrite", "overwrite=true", "-o", "g.h5"]
    monkeypatch.setattr(sys, "argv", ["dataflex", *arguments])
    for notes, shown in (([], shlex.join(arguments)), (["3 of 9 rows"], "grads 'my run.yaml' -o g.h5")):
        with pytest.raises(typer.Exit), session(None, {}, as_json=False, quiet=True):
            stop = Interrupted(143)
            for note in notes:
                stop.add_note(note)
            raise stop
        error = capsys.readouterr().err
        assert error.startswith("error: terminated: ")
        assert error.endswith(f"To go on: dataflex {shown}\n")


def command(name: str, settings: dict, *more: object) -> list[str]:
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "dataflex", name, *arguments, *map(str, more)]


def stopped(arguments: list[str], ready, number: int) -> tuple[int, str, float]:
    """Start it, send the signal once `ready`, and return its exit code, its stderr and the seconds it took to end."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout == ""
    return process.returncode, stderr, time.monotonic() - sent


def test_a_real_signal_in_a_real_run(settings, whole, tmp_path):
    folder = tmp_path / "out"
    arguments = command("dynamic", settings, f"output_dir={folder}")
    log = folder / "trainer_log.jsonl"
    code, stderr, _ = stopped(arguments, log.exists, signal.SIGTERM)
    assert code == 143, stderr
    assert "Traceback" not in stderr
    assert re.search(r"terminated: .*step \d of 7 is saved in .*To go on: dataflex dynamic ", stderr)
    shown = shlex.split(stderr.rpartition("To go on: dataflex ")[2])
    done = subprocess.run([*arguments[:3], *shown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert_same_end(folder, whole)


def test_two_processes_stop_together(settings, tmp_path):
    checkpoint = warmup(load_config(options={**settings, "output_dir": str(tmp_path / "warm"), "max_steps": 1}))
    more = {**settings, "max_samples": 300, "checkpoint": checkpoint}
    path = tmp_path / "g.h5"

    def some_rows() -> bool:
        if not path.exists():
            return False
        with h5py.File(path) as store:
            return bool(store["done"][:].any())

    code, stderr, seconds = stopped(command("grads", more, "--nproc", 2, "-o", path), some_rows, signal.SIGINT)
    assert code == 130, stderr
    assert seconds < 15
    assert stderr.count("error:") == 1 and "Traceback" not in stderr
    with h5py.File(path) as store:
        done = int(store["done"][:].sum())
    assert 0 < done < 300
    assert f"{done} of 300 rows are committed in {path}. To go on: dataflex grads " in stderr
    grads(load_config(options={**more, "output": str(path)}))
    alone = grads(load_config(options={**more, "output": str(tmp_path / "alone.h5")}))
    assert path.read_bytes() == alone.read_bytes()
