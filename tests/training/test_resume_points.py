"""Which checkpoint training goes on from: the newest whole one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from dataflex.training.resume import last_checkpoint, no_code_from_disk, step_of


def made(folder: Path, step: int, *names: str) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in names:
        (checkpoint / name).touch()
    return checkpoint


def test_a_checkpoint_that_was_cut_off_is_deleted_and_the_one_before_taken(tmp_path):
    whole = made(tmp_path, 9, "trainer_state.json", "optimizer.pt", "moments.safetensors")
    cut_off = made(tmp_path, 10, "trainer_state.json", "optimizer.pt")  # its moments come last
    assert last_checkpoint(tmp_path) == whole
    assert not cut_off.exists()
    assert step_of(whole) == 9


def test_without_optimizer_state_nothing_goes_on(tmp_path):
    model_only = made(tmp_path, 3, "trainer_state.json", "moments.safetensors")
    assert last_checkpoint(tmp_path) is None
    assert model_only.exists()


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
