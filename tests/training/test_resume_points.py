"""Which checkpoint training goes on from, what a kill leaves, and what is refused instead of guessed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataflex import load_config, train
from dataflex.errors import DataflexError, UsageError
from dataflex.origin import Origin
from dataflex.progress import Silent, SilentTask
from dataflex.provenance import RunRecord, was_begun
from dataflex.training import checkpoints
from dataflex.training.checkpoints import (
    FILE_NAME,
    check_whole,
    checkpoints_in,
    is_sealed,
    keep_newest,
    newest_sealed,
    read_contents,
    remove,
    seal,
    step_of,
)
from dataflex.training.method import TrainingMethod
from dataflex.training.moments import AdamMoments
from dataflex.training.resume import check_method, forget_later, last_checkpoint, no_code_from_disk

PLAIN = TrainingMethod(1, "no")
NO_MOMENTS = AdamMoments({}, {}, {}, 0, 0.1, 0.9, 0.999, 1e-8)


def made(folder: Path, step: int, *, sealed: bool = True, resumable: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_text("state")
    if sealed:
        seal(checkpoint, NO_MOMENTS, PLAIN, 0.1, resumable)
    return checkpoint


def test_the_newest_that_was_finished_is_taken_and_what_was_cut_off_goes(tmp_path):
    for step in (9, 10):
        made(tmp_path, step)
    cut_off = made(tmp_path, 11, sealed=False)
    (tmp_path / "checkpoint-notes").mkdir()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [9, 10, 11]
    assert last_checkpoint(tmp_path) == newest_sealed(tmp_path) == tmp_path / "checkpoint-10"
    assert cut_off.exists()  # looking deletes nothing
    forget_later(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-notes"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [2, 4, 10, 12]), (3, None, [4, 10, 12]), (1, None, [12]), (1, 4, [4, 12]), (3, 2, [2, 10, 12])],
)
def test_the_oldest_go_first(tmp_path, limit, best, kept):
    for step in (12, 10, 2, 4):
        made(tmp_path, step)
    keep_newest(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == kept


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    checkpoint = made(tmp_path, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    remove(checkpoint)
    assert not is_sealed(checkpoint)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("{"), lambda path: path.write_text("[]")])
def test_a_checkpoint_that_does_not_say_what_it_holds(tmp_path, spoil):
    made(tmp_path, 3)
    spoil(made(tmp_path, 5) / FILE_NAME)
    with pytest.raises(UsageError, match=r"checkpoint-5 .*checkpoint\.json.*; delete it, and .* from checkpoint-3"):
        last_checkpoint(tmp_path)


ZERO2, ZERO3 = TrainingMethod(2, "no", 2), TrainingMethod(2, "no", 3)
METHODS = [PLAIN, TrainingMethod(2, "no"), TrainingMethod(2, "bf16"), ZERO2, ZERO3, TrainingMethod(4, "no", 3)]
METHODS += [TrainingMethod(1, "bf16"), TrainingMethod(1, "no", 2), TrainingMethod(2, "no", 2, True)]


@pytest.mark.parametrize("then", METHODS, ids=str)
def test_going_on_another_way_is_exact_or_refused(tmp_path, then):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    seal(checkpoint, NO_MOMENTS, then, 0.1, resumable=True)
    allowed = {
        PLAIN: {PLAIN, TrainingMethod(2, "no")},
        TrainingMethod(2, "no"): {PLAIN, TrainingMethod(2, "no")},
        TrainingMethod(2, "bf16"): {TrainingMethod(2, "bf16"), TrainingMethod(1, "bf16")},
        TrainingMethod(1, "bf16"): {TrainingMethod(2, "bf16"), TrainingMethod(1, "bf16")},
    }.get(then, {then})
    for now in METHODS:
        for random in (False, True):
            if now == then or (now in allowed and not random):
                check_method(checkpoint, now, lambda random=random: random)
                continue
            with pytest.raises(UsageError) as refused:
                check_method(checkpoint, now, lambda random=random: random)
            said = str(refused.value)
            assert f"was trained {then}, and this command would train {now}." in said
            assert f"Go on {then.settings()}, or give --overwrite" in said
            assert ("Dropout" in said) == (now in allowed)


def test_a_method_in_words():
    assert str(PLAIN) == "in one process"
    assert (
        str(TrainingMethod(2, "bf16", 3, True)) == "in 2 processes by DeepSpeed ZeRO-3 with optimizer offload with bf16"
    )
    assert ZERO2.settings() == "with deepspeed naming DeepSpeed ZeRO-2, --nproc 2 and mixed precision no"


@pytest.fixture
def config(tiny_run: dict, tmp_path: Path):
    more = {"output_dir": str(tmp_path / "out"), "max_steps": 5, "save_steps": 2, "lora_dropout": 0.1}
    return load_config(options={**tiny_run, **more})


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopsAfter(Silent, SilentTask):
    """A Progress that ends a training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def task(self, description, total, unit, *expected):
        import contextlib

        return contextlib.nullcontext(self)

    def advance(self, amount=1, **shown):
        self.left -= bool(amount and "loss" not in shown)
        if self.left < 0:
            raise Stopped


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def killed(work: Callable[[], object]) -> int:
    """The exit code of a forked process that does `work`; 9 is what the tests below kill it with."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def whole(config, tmp_path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    return adapter(train(config.changed(output_dir=str(tmp_path / "whole"))))


@pytest.mark.parametrize("moment", ["write_json", "save_moments", "keep_newest", "remove", "rmtree"])
@pytest.mark.parametrize("time", [1, 2])
def test_a_kill_while_a_checkpoint_is_sealed_or_removed_loses_no_more_than_it(config, whole, moment, time, monkeypatch):
    """save_total_limit 1: there is never less than one checkpoint to go on from, once there was one."""
    from dataflex.training import trainer

    config = config.changed(save_total_limit=1)
    owner = {"keep_newest": trainer, "rmtree": shutil}.get(moment, checkpoints)
    true, calls = getattr(owner, moment), []

    def kill(*arguments, **options):
        calls.append(moment)
        if len(calls) == time:
            os._exit(9)
        return true(*arguments, **options)

    folder = Path(config.output_dir)
    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, kill)
        assert killed(lambda: train(config)) == 9
    finished = newest_sealed(folder)
    before_first = moment in ("write_json", "save_moments") and time == 1
    assert (finished is None) == before_first
    if finished:
        check_whole(finished)
    train(config)
    found = adapter(folder)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert [step_of(path) for path in checkpoints_in(folder)] in ([5], [4, 5])  # nothing is saved after the last


def test_every_file_of_a_checkpoint_is_needed(config, tmp_path):
    with pytest.raises(Stopped):
        train(config, StopsAfter(4))
    folder = Path(config.output_dir)
    checkpoint = folder / "checkpoint-4"
    files = read_contents(checkpoint).files
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= files.keys()
    for name in files:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        with pytest.raises(UsageError, match=rf"checkpoint-4 is damaged \({name} is missing\); .*checkpoint-2"):
            train(config)
        (checkpoint / name).write_bytes(content[:-1])
        with pytest.raises(UsageError, match=rf"checkpoint-4 is damaged \({name} has .*\); .*checkpoint-2"):
            train(config)
        (checkpoint / name).write_bytes(content)
    shutil.rmtree(checkpoint)
    train(config)  # as the message says


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scheduler.pt", "the next learning rate is .*, not "),
        ("optimizer.pt", r"the next learning rate is|the optimizer has taken 2 steps at .*lora_A.*, not 4"),
        ("trainer_state.json", "training is at step 2"),
    ],
)
def test_state_of_another_step_is_not_trained_on_with(config, name, words):
    with pytest.raises(Stopped):
        train(config, StopsAfter(4))
    folder = Path(config.output_dir)
    shutil.copy(folder / "checkpoint-2" / name, folder / "checkpoint-4" / name)
    contents = json.loads((folder / "checkpoint-4" / FILE_NAME).read_text())
    contents["files"][name] = (folder / "checkpoint-4" / name).stat().st_size  # so that only its contents are wrong
    (folder / "checkpoint-4" / FILE_NAME).write_text(json.dumps(contents))
    with pytest.raises(DataflexError, match=rf"checkpoint-4 is damaged \(after loading it, ({words})"):
        train(config)
    assert not (folder / "checkpoint-5").exists()


def test_moments_that_are_not_the_optimizers_are_told(config):
    with pytest.raises(Stopped):
        train(config, StopsAfter(4))
    checkpoint = Path(config.output_dir) / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][3]["exp_avg_sq"][0, 0] += 1
    torch.save(state, checkpoint / "optimizer.pt")
    with pytest.raises(DataflexError, match=r"the optimizer's exp_avg_sq of .* is not the one in moments"):
        train(config)


def test_a_run_that_keeps_the_model_alone_is_not_deleted_when_it_is_started_again(config):
    config = config.changed(save_only_model=True)
    with pytest.raises(Stopped):
        train(config, StopsAfter(4))
    folder = Path(config.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for again in (config, config.changed(save_only_model=False)):
        with pytest.raises(UsageError, match=r"checkpoint-4 was written under save_only_model: .*adapter_name_or_path"):
            train(again)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    train(config.changed(overwrite=True))
    train(config)  # finished


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_before_run_json_leaves_a_folder_that_the_same_command_takes_up(config, whole, at, monkeypatch):
    calls = []
    true = os.replace

    def kill(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            os._exit(9)  # with a temporary file beside the one to be written
        return true(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        assert killed(lambda: train(config)) == 9
    folder = Path(config.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert "run.json" not in names
    assert any(name.endswith(".tmp") for name in names)
    train(config)
    found = adapter(folder)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not list(folder.glob(".*.tmp"))


def test_what_is_no_run_is_none(tmp_path):
    assert not was_begun(tmp_path / "missing")
    assert not was_begun(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert not was_begun(tmp_path)  # someone's own
    (tmp_path / ".lock").touch()
    assert was_begun(tmp_path)
    (tmp_path / "thesis.tex").touch()
    assert not was_begun(tmp_path)


def test_a_fresh_start_that_is_cut_off_leaves_no_finished_run_without_its_checkpoints(config, monkeypatch):
    folder = train(config)
    monkeypatch.setattr(shutil, "rmtree", lambda path: os._exit(9))
    assert killed(lambda: train(config.changed(overwrite=True))) == 9
    monkeypatch.undo()
    with pytest.raises(UsageError, match="not empty; give --overwrite"):
        train(config)
    train(config.changed(overwrite=True))
    assert (folder / "checkpoint-5" / FILE_NAME).is_file()


def test_how_a_run_trains_is_on_record(config):
    folder = train(config.changed(max_steps=2, bf16=True))
    method = {"processes": 1, "mixed_precision": "bf16", "zero_stage": None, "optimizer_offload": False}
    assert json.loads((folder / "run.json").read_text())["method"] == method
    assert json.loads((folder / "checkpoint-2" / FILE_NAME).read_text())["method"] == method


def test_two_runs_in_one_folder(config):
    from dataflex.provenance import open_record

    origin = Origin("train", {}, {})
    with open_record(config, origin) as record:
        assert isinstance(record, RunRecord)
        with pytest.raises(UsageError, match="another run is writing there"), open_record(config, origin):
            pass
    with open_record(config, origin):
        pass


class TouchesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def weights_only_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "WEIGHTS_ONLY" in name}


@pytest.mark.parametrize("users_own", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_no_caller_loads_more_than_tensors(tmp_path, monkeypatch, users_own, deepspeed):
    for name, value in users_own.items():
        monkeypatch.setenv(name, value)
    before = weights_only_variables()
    torch.save(TouchesAFile(tmp_path / "touched"), tmp_path / "evil.pt")
    torch.save({"step": 3, "state": torch.ones(2)}, tmp_path / "good.pt")
    with no_code_from_disk(deepspeed):
        assert torch.load(tmp_path / "good.pt", weights_only=False)["step"] == 3
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "touched").exists()
    assert weights_only_variables() == before


def test_deepspeeds_own_records_are_known(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [LossScaler(1.0), ZeroStageEnum.weights, fragment_address(3, 4)]
    torch.save(records, tmp_path / "records.pt")
    with no_code_from_disk(deepspeed=True):
        found = torch.load(tmp_path / "records.pt", weights_only=False)
    assert found[1:] == records[1:]
    assert found[0].cur_scale == 1.0
