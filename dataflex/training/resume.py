"""Taking up a training where it stopped: from which checkpoint, in which way, and whether it was read as written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataflex.errors import DataflexError, UsageError
from dataflex.files import write_text
from dataflex.training.checkpoints import (
    check_whole,
    checkpoints_in,
    is_sealed,
    newest_sealed,
    read_contents,
    remove,
    step_of,
    way_out,
)
from dataflex.training.method import TrainingMethod
from dataflex.training.moments import AdamMoments, load_moments


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest finished checkpoint, which training goes on from, or None.

    Raises:
        UsageError: training cannot go on from it: it is damaged, or holds the model alone.
    """
    newest = newest_sealed(output_dir)
    if newest is not None:
        check_whole(newest)
    return newest


def check_resume(wish: bool | str | None, output_dir: Path) -> None:
    """Raise a UsageError where `resume_from_checkpoint` asks for another course than going on from the newest
    checkpoint in `output_dir`."""
    newest = newest_sealed(output_dir)
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


def check_method(checkpoint: Path, now: TrainingMethod, draws_random_numbers: Callable[[], bool]) -> None:
    """Raise a UsageError where going on from `checkpoint` by the method `now` is not what going on by its own is.

    Args:
        draws_random_numbers: whether a step does; asked only where the answer decides.
    """
    then = read_contents(checkpoint).method
    if then == now:
        return
    reason = ""
    if then.equals(now):
        if not draws_random_numbers():
            return
        reason = " Dropout and noise are drawn in each process, so that the number of processes decides the result."
    raise UsageError(
        f"{checkpoint} was trained {then}, and this command would train {now}.{reason} "
        f"Go on {then.settings()}, or give --overwrite to start afresh"
    )


def check_loaded(checkpoint: Path, step: int, moments: AdamMoments, learning_rates: list[float]) -> None:
    """Raise a DataflexError unless the state that was loaded from `checkpoint` is what was written there.

    Args:
        step: the trainer's.
        moments: the optimizer's.
        learning_rates: of the next step, by everyone who should know it: optimizer and scheduler.
    """
    import torch

    wanted = load_moments(checkpoint)
    rate = read_contents(checkpoint).next_learning_rate
    problem = None
    if step != step_of(checkpoint) or wanted is None or wanted.step != step:
        problem = f"training is at step {step}"
    elif any(found != rate for found in learning_rates):
        problem = f"the next learning rate is {learning_rates[0]} and {learning_rates[-1]}, not {rate}"
    elif moments.steps != wanted.steps:
        odd = next(name for name in wanted.steps if moments.steps.get(name) != wanted.steps[name])
        problem = f"the optimizer has taken {moments.steps.get(odd)} steps at {odd}, not {wanted.steps[odd]}"
    else:
        for kind in ("exp_avg", "exp_avg_sq"):
            found, kept = getattr(moments, kind), getattr(wanted, kind)
            name = next((name for name in kept if not torch.equal(found[name].cpu(), kept[name])), None)
            if name is not None:
                problem = f"the optimizer's {kind} of {name} is not the one in moments.safetensors"
    if problem:
        raise DataflexError(f"{checkpoint} is damaged (after loading it, {problem}); {way_out(checkpoint)}")


@contextlib.contextmanager
def no_code_from_disk(deepspeed: bool) -> Iterator[None]:
    """While the block runs, `torch.load` reads tensors and plain values, whatever its caller asks for: a pickle that
    names anything else is refused. DeepSpeed asks for more; its checkpoints hold a few records of its own beside."""
    import torch

    records: list[Any] = []
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


def forget_later(output_dir: Path, step: int) -> None:
    """Drop what a run that goes on from `step` makes again: later checkpoints, log lines and selections, and what a
    kill left half written."""
    for folder in checkpoints_in(output_dir):
        if step_of(folder) > step or not is_sealed(folder):
            remove(folder)
    for path in (output_dir / "selections").glob("step-*"):
        number = path.name.removeprefix("step-").split(".")[0]
        if number.isdigit() and int(number) > step:
            path.unlink()
    for folder in (output_dir, output_dir / "selections"):
        for path in folder.glob(".*.tmp"):  # as files.atomic names them
            path.unlink()
    log = output_dir / "trainer_log.jsonl"
    if log.is_file():
        kept = [line + "\n" for line in log.read_text(encoding="utf-8").splitlines() if _step_of_line(line) <= step]
        write_text(log, "".join(kept))


def _step_of_line(line: str) -> Any:
    try:
        return json.loads(line)["current_steps"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the line that was being written when the run stopped
