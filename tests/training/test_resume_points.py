"""Which checkpoint training goes on from: the newest whole one."""

from __future__ import annotations

from pathlib import Path

from dataflex.training.resume import last_checkpoint, step_of


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
