"""Bad days: processes killed at random, disks that fill up, files that rot, rows without a direction."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dataflex import dynamic, grads, load_config, open_store, score, warmup
from dataflex.data.examples import load_split
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients import collect, passes
from dataflex.model import load_tokenizer
from dataflex.planning import plan
from dataflex.progress import Interrupted, Silent, SilentTask
from dataflex.store.layout import header_checksum


@pytest.fixture(scope="module")
def settings(tiny_run: dict) -> dict:
    return {
        **tiny_run,
        "max_samples": 64,
        "warmup_step": 2,
        "update_times": 3,
        "save_steps": 3,
        "token_budget": 96,  # many small batches
    }


@pytest.fixture(scope="module")
def checkpoint(settings, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("warm") / "out"
    return str(warmup(load_config(options={**settings, "output_dir": str(folder)})))


@pytest.fixture(scope="module")
def whole(settings, checkpoint, tmp_path_factory) -> Path:
    """A store that was never interrupted."""
    path = tmp_path_factory.mktemp("store") / "whole.h5"
    return grads(load_config(options={**settings, "checkpoint": checkpoint, "output": str(path)}))


def lives(
    work: Callable[[], object],
    kills: int,
    seconds: tuple[float, float],
    seed: int,
    after: Callable = lambda: None,
    begun: Callable[[], bool] = lambda: True,
) -> None:
    """Do `work` in one forked process after another, each killed after a random while, then in one left alone.

    In two lives of three the while begins when `begun` says so, however slow the machine is. `after` each life the
    scene is looked at. Forked from a process that has loaded everything, a life is all work.
    """
    generator = random.Random(seed)
    for life in range(kills + 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        if life < kills:
            while life % 3 and not begun() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.005)
            time.sleep(generator.uniform(*seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), f"life {life} failed"
        after()
    assert code == 0


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes in a forked process."""
    started = time.monotonic()
    lives(work, 0, (0, 0), 0)
    return time.monotonic() - started


def test_a_store_survives_thirty_kills(settings, checkpoint, whole, tmp_path):
    options = {**settings, "checkpoint": checkpoint}
    torch.set_num_threads(1)  # a forked process has no other threads
    once = timed(lambda: grads(load_config(options={**options, "output": str(tmp_path / "timed.h5")})))
    path = tmp_path / "g.h5"
    done = [0]

    def rows_done() -> int:
        if not path.exists():
            return 0
        with h5py.File(path) as store:  # plain h5py
            return int(store["done"][:].sum())

    work = load_config(options={**options, "output": str(path)})
    lives(
        lambda: grads(work),
        30,
        (0, 0.1 * once),
        seed=5,
        after=lambda: done.append(rows_done()),
        begun=lambda: rows_done() > done[-1],
    )
    assert done == sorted(done)  # nothing that was committed is lost
    assert len(set(done)) > 5  # the kills fell into the work
    assert path.read_bytes() == whole.read_bytes()


def test_a_budget_left_out_is_the_one_the_store_was_begun_with(settings, checkpoint, whole, tmp_path):
    """Free memory may have changed: other batches would come to other bits."""
    path = tmp_path / "g.h5"
    shutil.copy(whole, path)
    with h5py.File(path, "r+") as store:
        lost = slice(7, 50)
        for name in ("gradients", "norm", "loss", "done"):
            store[name][lost] = 0
    left_out = {key: value for key, value in settings.items() if key != "token_budget"}
    grads(load_config(options={**left_out, "checkpoint": checkpoint, "output": str(path)}))
    assert path.read_bytes() == whole.read_bytes()
    with h5py.File(path) as store:
        assert json.loads(store.attrs["manifest"])["token_budget"] == 96


def outcome(folder: Path) -> tuple[dict, dict, list]:
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return (
        {path.name: path.read_text() for path in (folder / "selections").glob("*.jsonl")},
        {name: value.tolist() for name, value in load_file(folder / "adapter_model.safetensors").items()},
        [(line["current_steps"], line["loss"]) for line in log],
    )


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    for name in theirs[1]:
        np.testing.assert_allclose(ours[1][name], theirs[1][name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return dynamic(load_config(options={**settings, "max_samples": 24, "output_dir": str(folder)}))


def test_a_dynamic_run_survives_ten_kills(settings, plain, tmp_path):
    options = {**settings, "max_samples": 24}
    torch.set_num_threads(1)
    once = timed(lambda: dynamic(load_config(options={**options, "output_dir": str(tmp_path / "timed")})))
    work = load_config(options={**options, "output_dir": str(tmp_path / "out")})
    lives(lambda: dynamic(work), 10, (0.2 * once, once), seed=7)
    assert_same(outcome(tmp_path / "out"), outcome(plain))


class Disk:
    """A small file system. Where none may be mounted, the limit on a file's size stands in: other words, the same
    calls that fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        self.mounted = subprocess.run(command, capture_output=True).returncode == 0

    def fill(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return
        with (self.folder / "junk").open("wb", buffering=0) as handle, contextlib.suppress(OSError):
            while handle.write(b"x" * 4096):
                pass

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with contextlib.suppress(OSError):
            (self.folder / "junk").unlink()

    def remove(self) -> None:
        self.make_room()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


class FillsTheDisk(Silent, SilentTask):
    """A Progress that leaves no byte free once some work of a kind is under way."""

    def __init__(self, disk: Disk, description: str, report: int) -> None:
        self.disk, self.description, self.left = disk, description, report

    @contextlib.contextmanager
    def task(self, description, total, unit, *expected):
        yield self if description == self.description else FillsTheDisk(self.disk, "", 0)

    def advance(self, amount=1, **shown):
        self.left -= bool(amount)
        if self.left == 0:
            self.disk.fill()


def test_an_interruption_while_the_last_rows_are_written_keeps_them(settings, checkpoint, whole, tmp_path, monkeypatch):
    """All are computed, no bar is shown any more, and a signal ends the command at once."""
    to_disk, last = os.fdatasync, threading.Event()

    def marked(capture, examples, batches, *rest, **options):
        for number, rows in enumerate(passes.project_rows(capture, examples, batches, *rest, **options), start=1):
            if number == len(batches):
                last.set()
            yield rows

    def slow_at_last(handle: int) -> None:
        if last.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            time.sleep(0.8)
        to_disk(handle)

    def stop(number: int, frame: object) -> None:
        raise Interrupted(130)

    config = load_config(options={**settings, "checkpoint": checkpoint, "output": str(tmp_path / "g.h5")})
    monkeypatch.setattr(collect, "project_rows", marked)
    monkeypatch.setattr(os, "fdatasync", slow_at_last)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Interrupted) as interrupted:
            grads(config)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted.value.__notes__ == [f"64 of 64 rows are committed in {config.output}"]
    assert Path(config.output).read_bytes() == whole.read_bytes()


FULL = "(No space left on device|File too large); make room, and the same command goes on"


def test_a_store_on_a_full_disk_is_gone_on_with(settings, checkpoint, whole, disk):
    path = disk.folder / "g.h5"
    config = load_config(options={**settings, "checkpoint": checkpoint, "output": str(path)})
    with pytest.raises(DataflexError, match=rf"g\.h5: {FULL}; \d+ of 64 rows are committed") as error:
        grads(config, FillsTheDisk(disk, "train gradients", 3))
    assert error.value.exit_code == 1
    with open_store(path) as store:
        rows = np.flatnonzero(store.done)
        assert 0 < len(rows) < 64
        with open_store(whole) as other:
            np.testing.assert_array_equal(store[rows], other[rows])
    disk.make_room()
    grads(config)
    assert path.read_bytes() == whole.read_bytes()


def test_a_store_that_cannot_fit_is_not_begun(settings, checkpoint, disk):
    if not disk.mounted:
        pytest.fail("this one needs a disk of a known size: run it as root", pytrace=False)
    more = {"checkpoint": checkpoint, "output": str(disk.folder / "g.h5"), "proj_dim": 10**6}
    wanted = (
        r"g\.h5: \d+ bytes \(0\.128 GB\) are needed, and \S+ has \d+ bytes \(0\.0336 GB\) free; make room, or lower"
    )
    for command in (grads, lambda config: plan(config, "grads")):
        with pytest.raises(UsageError, match=wanted):
            command(load_config(options={**settings, **more}))
    assert list(disk.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("work", "report", "what"),
    [
        ("training", 3, "output_dir"),  # a checkpoint
        ("train gradients", 2, "gradient store"),
        ("scoring", 1, "cannot write"),  # the selection
        ("eval loss after", 1, "cannot write"),  # run.json
    ],
)
def test_a_run_on_a_full_disk_is_gone_on_with(settings, plain, disk, work, report, what):
    folder = disk.folder / "out"
    config = load_config(options={**settings, "max_samples": 24, "output_dir": str(folder)})
    with pytest.raises(DataflexError, match=f"{what} .*{FULL}"):
        dynamic(config, FillsTheDisk(disk, work, report))
    disk.make_room()
    dynamic(config)
    assert_same(outcome(folder), outcome(plain))


def test_what_cannot_be_written_is_refused_before_any_work(settings, checkpoint, disk):
    if not disk.mounted:
        disk.folder.chmod(0o500)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    for command, more in (
        (grads, {"checkpoint": checkpoint, "output": str(disk.folder / "new" / "g.h5")}),
        (dynamic, {"output_dir": str(disk.folder / "out")}),
    ):
        with pytest.raises(UsageError, match="no permission to write in"):
            command(load_config(options={**settings, **more, "model_name_or_path": "never-looked-at"}))


def flip(path: Path, text: bytes) -> None:
    """Change one byte of `text` where it stands in the file."""
    content = bytearray(path.read_bytes())
    place = content.index(text) + len(text) // 2
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


SPOILED = {
    "manifest changed": lambda path: flip(path, b'"template": "qwen"'),
    "manifest no JSON": lambda path: flip(path, b'": "qwen"'),
    "half a file": lambda path: cut(path, 0.5),
    "the last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "the head only": lambda path: cut(path, 0.01),
    "nothing": lambda path: cut(path, 0),
    "rows changed": lambda path: change(path, "row"),
    "tokens changed": lambda path: change(path, "tokens"),
}


def change(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        file[name][1] += 1


@pytest.mark.parametrize("how", SPOILED)
def test_a_store_that_rotted_is_refused_everywhere(settings, checkpoint, whole, tmp_path, how):
    path = shutil.copy(whole, tmp_path / "g.h5")
    SPOILED[how](path)
    more = {"train_stores": str(path), "eval_stores": str(path), "output": str(tmp_path / "s.jsonl")}
    with pytest.raises(UsageError, match=r"g\.h5: .*--overwrite"):
        score(load_config(options=more))
    with pytest.raises(UsageError, match=r"g\.h5[: ].*--overwrite"):
        grads(load_config(options={**settings, "checkpoint": checkpoint, "output": str(path)}))


def as_split(store: Path, path: Path, split: str) -> Path:
    """A copy of a store that says its rows are of `split`."""
    shutil.copy(store, path)
    with h5py.File(path, "r+") as file:
        manifest = json.dumps({**json.loads(file.attrs["manifest"]), "split": split})
        subtask = file["subtask"].asstr()[:].tolist() if "subtask" in file else None
        file.attrs["manifest"] = manifest
        file.attrs["checksum"] = header_checksum(manifest, file["row"][:], file["tokens"][:], subtask)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int1"])
def test_a_row_that_became_zeros_is_damage_and_not_a_score_of_zero(settings, checkpoint, tmp_path, dtype):
    options = {**settings, "checkpoint": checkpoint, "store_dtype": dtype, "max_samples": 6}
    path = grads(load_config(options={**options, "output": str(tmp_path / "g.h5")}))
    target = grads(load_config(options={**options, "output": str(tmp_path / "e.h5"), "split": "eval"}))
    with h5py.File(path, "r+") as file:
        file["gradients"][3] = 0
    more = {"train_stores": str(path), "eval_stores": str(target), "output": str(tmp_path / "s.jsonl")}
    with pytest.raises(UsageError, match=r"g\.h5: damaged, the gradient of row 3 is not the one that was written"):
        score(load_config(options=more))
    with open_store(path) as store:
        assert store.damaged_rows() == [3]
        with pytest.raises(UsageError, match="damaged"):
            store[2:4]


def test_a_damaged_vector_is_not_scored(whole, tmp_path):
    path = shutil.copy(whole, tmp_path / "g.h5")
    with h5py.File(path, "r+") as file:
        file["gradients"][3, 5] = np.nan
    with pytest.raises(UsageError, match=r"g\.h5: damaged"):
        score(
            load_config(
                options={
                    "train_stores": str(path),
                    "eval_stores": str(as_split(whole, tmp_path / "e.h5", "eval")),
                    "output": str(tmp_path / "s.jsonl"),
                }
            )
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run.json", r"run\.json: not readable"),
        ("checkpoint-{}/moments.safetensors", r"moments\.safetensors is broken"),
        ("checkpoint-{}/adapter_model.safetensors", r"checkpoint-\d+ is damaged"),
        ("checkpoint-{}/optimizer.pt", r"checkpoint-\d+ is damaged"),
        ("checkpoint-{}/trainer_state.json", r"checkpoint-\d+ is damaged"),
    ],
)
def test_a_run_whose_files_rotted_is_refused_by_name(settings, plain, tmp_path, name, words):
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
    cut(folder / name.format(8), 0.6)
    with pytest.raises(DataflexError, match=words):
        dynamic(load_config(options={**settings, "max_samples": 24, "output_dir": str(folder)}))


class Says(Silent):
    def __init__(self) -> None:
        self.lines = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture
def bad_rows(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Rows whose directions come out as NaN (even) or zero (odd), whatever is computed."""
    rows = {6, 11}
    true = passes._project_batch

    def spoilt(capture, batch, *rest):
        vectors, loss, plain = true(capture, batch, *rest)
        for index, example in enumerate(row.example for row in batch):
            if example.row in rows and example.dataset == "alpaca_en_demo":
                vectors[index] = float("nan") if example.row % 2 == 0 else 0
        return vectors, loss, plain

    monkeypatch.setattr(passes, "_project_batch", spoilt)
    return rows


@pytest.mark.parametrize("dtype", ["float16", "int8", "int1"])
def test_bad_rows_are_marked_reported_and_never_scored(settings, checkpoint, tmp_path, bad_rows, dtype):
    path = tmp_path / "g.h5"
    options = {**settings, "checkpoint": checkpoint, "output": str(path), "store_dtype": dtype}
    with pytest.raises(DataflexError, match=r"row (6|11) of alpaca_en_demo: .*(all zero|not finite).*--skip-bad-rows"):
        grads(load_config(options=options))
    said = Says()
    grads(load_config(options={**options, "skip_bad_rows": True}), said)
    assert any("row 6 of alpaca_en_demo" in line and "row 11 of" in line for line in said.lines)
    with open_store(path) as store:
        store.require_whole()
        assert store.row[store.bad].tolist() == sorted(bad_rows)
        assert not store[store.bad].any()
        assert np.isfinite(store[:]).all()
    with pytest.raises(DataflexError, match="row 6 of alpaca_en_demo"):  # not silently gone on with
        grads(load_config(options=options))

    target = grads(load_config(options={**options, "split": "eval", "output": str(tmp_path / "e.h5")}))
    more = {"train_stores": str(path), "output": str(tmp_path / "s.jsonl"), "overwrite": True}
    said = Says()
    score(load_config(options={**more, "eval_stores": str(target)}), said)
    assert any(line.startswith("2 of 64 rows have no gradient") for line in said.lines)
    scored = {json.loads(line)["row"] for line in (tmp_path / "s.jsonl").read_text().splitlines()}
    assert scored == set(range(64)) - bad_rows

    # as validation rows they have no part in the mean
    score(load_config(options={**more, "eval_stores": str(as_split(path, tmp_path / "v.h5", "eval"))}))
    values = [json.loads(line)["score"] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    with open_store(path) as store:
        good = store[:][~store.bad]
    np.testing.assert_allclose(values, good @ good.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"proj_dim": None}, {"reduce": "round-robin"}])
def test_a_dynamic_run_never_selects_bad_rows(settings, tmp_path, bad_rows, more):
    # each selection takes all rows but two
    options = {**settings, "max_samples": 24, "per_device_train_batch_size": 11, "warmup_step": 1, "update_times": 1}
    options |= {"output_dir": str(tmp_path / "out"), **more}
    with pytest.raises(DataflexError, match=r"row (6|11) of alpaca_en_demo"):
        dynamic(load_config(options=options))
    dynamic(load_config(options={**options, "skip_bad_rows": True}))  # goes on: the flag does not make it another run
    rows = [json.loads(line)["row"] for line in (tmp_path / "out/selections/step-1.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(set(range(24)) - bad_rows)
    bad_rows.add(3)
    with pytest.raises(DataflexError, match="takes 22 rows, but only 21 have a gradient"):
        dynamic(load_config(options={**options, "skip_bad_rows": True, "overwrite": True}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("instruction", "input", "output", "system", "history", "messages", "conversations", "tools", "subtask")
ROLES = ("user", "assistant", "human", "gpt", "tool")
TURNS = st.lists(
    st.fixed_dictionaries(
        {}, optional={key: st.sampled_from(ROLES) | JSON for key in ("role", "from")}
        | {key: JSON for key in ("content", "value", "tool_calls")},
    ),
    max_size=4,
)  # fmt: skip
RECORD = st.fixed_dictionaries({}, optional={name: st.text(max_size=8) | TURNS | JSON for name in FIELDS})


@pytest.fixture(scope="module")
def tokenizer(settings):
    return load_tokenizer(load_config(options=settings))


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(lines=st.lists(RECORD.map(json.dumps) | JSON.map(json.dumps) | st.text(max_size=10), max_size=4))
def test_any_lines_are_rows_or_one_message(settings, tokenizer, tmp_path, monkeypatch, lines):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        config = load_config(options={**settings, "dataset": str(path), "max_samples": None})
        examples = load_split(config, tokenizer).examples
    except UsageError as error:
        assert "rows.jsonl" in str(error) or "template" in str(error)
    else:
        for example in examples:
            assert len(example.input_ids) == len(example.labels) <= 64
