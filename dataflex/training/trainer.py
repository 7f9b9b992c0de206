"""One trainer for `warmup`, `train` and `dynamic`: transformers' own, told step by step which rows to take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dataflex import processes
from dataflex.config import RunConfig
from dataflex.data.batches import collate
from dataflex.data.examples import Example
from dataflex.errors import DataflexError
from dataflex.files import disk_errors_of
from dataflex.lora import layout, lora_pairs
from dataflex.progress import Interrupted, Progress, Task
from dataflex.training.moments import AdamMoments, live_moments, load_moments, save_moments
from dataflex.training.resume import last_checkpoint, no_code_from_disk, step_of

RowsForStep = Callable[[int, "RowTrainer"], list[int]]
"""(step about to be taken, trainer) → indices of that step's rows, over all processes."""


class RowTrainer(Trainer):
    """transformers' Trainer over rows that are named when a step begins, not when the run does."""

    def __init__(
        self,
        *,
        examples: list[Example],
        rows_for_step: RowsForStep,
        steps_per_epoch: int,
        save_at: Collection[int],
        task: Task,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=examples, **kwargs)
        self.examples = examples
        self.rows_for_step = rows_for_step
        self.steps_per_epoch = steps_per_epoch
        self.save_at = save_at
        self.last_learning_rate = 0.0
        self.log_callback = RunLog(self, task)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.log_callback)

    def get_train_dataloader(self) -> DataLoader:
        """As many batches as an epoch has; they only count, `get_batch_samples` brings the rows."""
        return DataLoader(range(self.steps_per_epoch * self.args.gradient_accumulation_steps))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of the step about to be taken, this process's share of its rows."""
        rows = self.rows_for_step(self.state.global_step, self)
        return super().get_batch_samples(self._batches(rows), num_batches, device)

    def _batches(self, rows: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        for start in range(self.args.process_index * size, len(rows), world * size):
            yield self.data_collator([self.examples[index] for index in rows[start : start + size]])

    def moments(self) -> AdamMoments:
        """The optimizer's moments as they are now."""
        slots = layout(lora_pairs(self.model))
        return live_moments(self.optimizer, slots, self.state.global_step, self.last_learning_rate)


class RunLog(TrainerCallback):
    """Progress, trainer_log.jsonl under LLaMA-Factory's keys, and Adam's moments beside every checkpoint."""

    def __init__(self, trainer: RowTrainer, task: Task) -> None:
        self.trainer = trainer
        self.task = task
        self.started = time.monotonic()
        self.began = False
        """Whether the checkpoint to go on from, if any, has been read."""
        self.interrupted: Interrupted | None = None
        """Raised by `fit` when the checkpoint of the step it came in is on disk."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = True

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # read here: once the step is over, the schedule has moved on to the next step's rate
        self.trainer.last_learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        try:
            processes.advance(self.task)
        except Interrupted as stop:
            self.interrupted = stop
            args.save_only_model = False  # this checkpoint is there to go on from
            control.should_save = control.should_training_stop = True
        # the end of the run is a checkpoint, whatever save_strategy says
        if state.global_step >= state.max_steps or state.global_step in self.trainer.save_at:
            control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        if "loss" in logs:
            self.task.advance(0, loss=float(logs["loss"]))
        elapsed = time.monotonic() - self.started
        share = state.global_step / state.max_steps
        record = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "loss": logs.get("loss"),
            "eval_loss": logs.get("eval_loss"),
            "lr": logs.get("learning_rate"),
            "epoch": logs.get("epoch"),
            "percentage": round(100 * share, 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(elapsed / share - elapsed) if share else None,
        }
        with (Path(args.output_dir) / "trainer_log.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({key: value for key, value in record.items() if value is not None}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moments = self.trainer.moments()
        if state.is_world_process_zero:
            save_moments(moments, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _kept(output_dir: Path, steps: int) -> str:
    """What a training that ends here leaves."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        return f"step 0 of {steps}, no checkpoint yet"
    return f"step {step_of(checkpoint)} of {steps} is saved in {checkpoint}"


def fit(
    config: RunConfig,
    args: TrainingArguments,
    model: torch.nn.Module,
    tokenizer: Any,
    examples: list[Example],
    *,
    steps_per_epoch: int,
    rows_for_step: RowsForStep,
    progress: Progress,
    eval_examples: list[Example] | None = None,
    save_at: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Train `model`'s adapter, save it with its tokenizer and logs in `output_dir`, and return the log history.

    Goes on from the newest checkpoint in `output_dir`, if there is one: the caller has seen that it is this run's.

    Args:
        args: `training_arguments(config, steps)`; made before the model, which ZeRO-3 shares out while it loads.
        save_at: steps after which a checkpoint is written besides those that `save_steps` names.
    """
    output_dir = Path(config.output_dir)
    checkpoint = last_checkpoint(output_dir)
    pad_token_id = tokenizer.pad_token_id
    with progress.task("training", args.max_steps, "steps") as task:
        trainer = RowTrainer(
            model=model,
            args=args,
            data_collator=lambda rows: collate(rows, pad_token_id),
            eval_dataset=eval_examples if config.eval_strategy != "no" else None,
            processing_class=tokenizer,
            examples=examples,
            rows_for_step=rows_for_step,
            steps_per_epoch=steps_per_epoch,
            save_at=save_at if config.save_strategy != "no" else (),
            task=task,
        )
        if checkpoint is not None:
            trainer.last_learning_rate = load_moments(checkpoint).learning_rate
            task.advance(step_of(checkpoint))
        try:
            with (
                disk_errors_of(f"output_dir {output_dir}", " from the last whole checkpoint"),
                no_code_from_disk(deepspeed=config.deepspeed is not None),
            ):
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if trainer.log_callback.interrupted is not None:
                raise trainer.log_callback.interrupted
        except Interrupted as stop:
            if processes.rank() == 0:
                stop.add_note(_kept(output_dir, args.max_steps))
            raise
        except Exception as error:
            if checkpoint is None or trainer.log_callback.began:
                raise
            if isinstance(error, UnpicklingError):
                reason = "a file in it holds more than tensors and plain values"
            else:
                reason = str(error).strip().partition("\n")[0]
            raise DataflexError(
                f"{checkpoint} is damaged ({reason}); delete it, and the same command goes on from the one before"
            ) from error
    with disk_errors_of(f"output_dir {output_dir}", " from the last checkpoint"):
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)
    return trainer.state.log_history
