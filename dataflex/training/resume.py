"""Taking up a training where it stopped: which checkpoint is whole, how it is read, what was written after it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from dataflex.errors import UsageError
from dataflex.files import write_text
from dataflex.training.moments import FILE_NAME as MOMENTS


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that training can go on from, or None.

    A checkpoint's moments are written last, so one without them was cut off; it is deleted here. One without
    optimizer state (`save_only_model`) is whole, but nothing can go on from it.
    """
    best: tuple[int, Path] | None = None
    for folder in output_dir.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not step.isdigit():
            continue
        if not (folder / MOMENTS).is_file():
            shutil.rmtree(folder)
            continue
        resumable = (folder / "trainer_state.json").is_file() and (
            (folder / "optimizer.pt").is_file() or any(folder.glob("global_step*"))
        )
        if resumable and (best is None or int(step) > best[0]):
            best = (int(step), folder)
    return best[1] if best else None


def check_resume(wish: bool | str | None, output_dir: Path) -> None:
    """Raise a UsageError where `resume_from_checkpoint` asks for another course than going on from the newest
    checkpoint in `output_dir`."""
    whole = [folder for folder in output_dir.glob("checkpoint-*") if (folder / MOMENTS).is_file()]
    newest = max(whole, key=lambda folder: step_of(folder), default=None)
    if wish is False and newest is not None:
        raise UsageError(f"resume_from_checkpoint is false, but {newest} is there; give --overwrite to start afresh")
    if not isinstance(wish, str):
        return
    if newest is None or Path(wish).resolve() != newest.resolve():
        there = f"the newest is {newest}" if newest else f"{output_dir} has no checkpoint"
        raise UsageError(
            f"resume_from_checkpoint: a run goes on from the newest checkpoint in its output_dir, not from {wish}; "
            f"{there}. To train on from another run's adapter, name it as adapter_name_or_path"
        )


@contextlib.contextmanager
def no_code_from_disk(deepspeed: bool) -> Iterator[None]:
    """While the block runs, `torch.load` reads tensors and plain values, whatever its caller asks for: a pickle that
    names anything else is refused. DeepSpeed asks for more; its checkpoints hold a few records of its own beside."""
    records: list[type] = []
    if deepspeed:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        records = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses to have both
    former = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(records):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in former.items() if value is not None})


def step_of(checkpoint: Path | None) -> int:
    """The optimizer steps behind a checkpoint; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def forget_later(output_dir: Path, step: int) -> None:
    """Drop the checkpoints, log lines and selections that belong to steps after `step`: they will come again."""
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder)
    for path in (output_dir / "selections").glob("step-*"):
        number = path.name.removeprefix("step-").split(".")[0]
        if number.isdigit() and int(number) > step:
            path.unlink()
    log = output_dir / "trainer_log.jsonl"
    if log.is_file():
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                current = json.loads(line)["current_steps"]
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run stopped
            if current <= step:
                kept.append(line + "\n")
        write_text(log, "".join(kept))
