"""One trainer for `warmup`, `train` and `dynamic`: transformers' own, told step by step which rows to take.

Four things hang on it, each with one job: `LiveOptimizer` sees the optimizer, `Checkpoints` finishes what transformers
writes and checks what it reads, `Steps` counts them and ends the run, `RunLog` writes trainer_log.jsonl.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.data.batches import collate
from dataflex.data.chat_tokenizer import set_chat
from dataflex.data.examples import Example
from dataflex.environment import without_back_doors
from dataflex.errors import DataflexError
from dataflex.files import disk_errors_of
from dataflex.json_text import json_of_figures
from dataflex.lora import layout, lora_pairs
from dataflex.model_card import SavedAdapters, describe_adapter
from dataflex.progress import Interrupted, Progress, Task
from dataflex.training.checkpoints import keep_newest, newest_sealed, seal, step_of, way_out
from dataflex.training.method import TrainingMethod, method_of, method_of_accelerator
from dataflex.training.moments import AdamMoments, live_moments, load_moments
from dataflex.training.resume import check_loaded, last_checkpoint, no_code_from_disk

RowsOf = Callable[[int], list[int]]
"""Step → indices of its rows, over all processes. Pure."""
Figures = dict[str, float]
"""What trackers are shown beside the loss, by name."""
BeforeStep = Callable[[int, Callable[[], AdamMoments], Task], Figures]
"""(step about to be taken, the moments as they are, the task that counts the steps) → the figures of whatever was to be
done before it."""


class RowTrainer(Trainer):
    """transformers' Trainer over rows that are named when a step begins, not when the run does."""

    def __init__(
        self,
        *,
        examples: Sequence[Example],
        rows_of: RowsOf,
        before_step: Callable[[int], Figures],
        steps_per_epoch: int,
        task: Task,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=examples, **kwargs)
        self.examples = examples
        self.rows_of = rows_of
        self.before_step = before_step
        self.steps_per_epoch = steps_per_epoch
        self.task = task
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As many batches as an epoch has; they only count, `get_batch_samples` brings the rows."""
        count: Any = range(self.steps_per_epoch * self.args.gradient_accumulation_steps)
        return DataLoader(count)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of the step about to be taken, this process's share of its rows."""
        step = self.state.global_step
        if figures := self.before_step(step):  # for trackers alone: a run's history is that of its training
            self.callback_handler.on_log(self.args, self.state, self.control, figures)
        return super().get_batch_samples(self._batches(self.rows_of(step)), num_batches, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.task.pause("evaluation"):
            return super().evaluate(*args, **kwargs)

    def _batches(self, rows: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        for start in range(self.args.process_index * size, len(rows), world * size):
            batch: list[Any] = [self.examples[index] for index in rows[start : start + size]]
            yield self.data_collator(batch)


class LiveOptimizer(TrainerCallback):
    """The optimizer of a training under way, and the learning rate it last had."""

    def __init__(self, last_learning_rate: float | None) -> None:
        self._last_learning_rate = last_learning_rate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer, self._slots = kwargs["optimizer"], layout(lora_pairs(kwargs["model"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # read here: once the step is over, the schedule has moved on to the next step's rate
        self._last_learning_rate = self.next_learning_rate

    @property
    def next_learning_rate(self) -> float:
        """Of the step about to be taken."""
        return float(self._optimizer.param_groups[0]["lr"])

    def moments(self, step: int) -> AdamMoments:
        """The optimizer's moments after `step` steps of the run; before the first, with the rate it will have."""
        rate = self.next_learning_rate if self._last_learning_rate is None else self._last_learning_rate
        return live_moments(self._optimizer, self._slots, step, rate)


class Checkpoints(TrainerCallback):
    """Checks the checkpoint a training goes on from, seals those it writes, and only then deletes older ones."""

    def __init__(self, live: LiveOptimizer, method: TrainingMethod, limit: int | None, resumed: Path | None) -> None:
        self.live, self.method, self.limit, self.resumed = live, method, limit, resumed
        self.loaded = False
        """Whether the checkpoint to go on from, if any, has been read and found right."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed is not None:
            rates = [self.live.next_learning_rate, *map(float, kwargs["lr_scheduler"].get_last_lr()[:1])]
            check_loaded(self.resumed, state.global_step, self.live.moments(state.global_step), rates)
        self.loaded = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moments = self.live.moments(state.global_step)
        processes.barrier()  # every process has written its part
        if state.is_world_process_zero:
            output_dir = Path(args.output_dir)
            folder = output_dir / f"checkpoint-{state.global_step}"
            seal(folder, moments, self.method, self.live.next_learning_rate, resumable=not args.save_only_model)
            keep_newest(output_dir, self.limit, state.best_model_checkpoint)


class Steps(TrainerCallback):
    """Advances the task by a step, and says where to save and where to stop."""

    def __init__(self, task: Task, save_at: Collection[int]) -> None:
        self.task, self.save_at = task, save_at
        self.interrupted: Interrupted | None = None
        """Raised by `fit` when the checkpoint of the step it came in is on disk."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        try:
            processes.advance(self.task)
        except Interrupted as stop:
            self.interrupted = stop
            args.save_only_model = False  # this checkpoint is there to go on from
            control.should_save = control.should_training_stop = True
        # the end of the run is a checkpoint, whatever save_strategy says
        if state.global_step >= state.max_steps or state.global_step in self.save_at:
            control.should_save = True
        return control


class RunLog(TrainerCallback):
    """trainer_log.jsonl under LLaMA-Factory's keys, and the loss beside the task's bar."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.started = time.monotonic()

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
            handle.write(json_of_figures({key: value for key, value in record.items() if value is not None}) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def evaluations_after(step: int, args: TrainingArguments, steps_per_epoch: int) -> int:
    """How many evaluations on eval_dataset a training that has taken `step` steps has before it."""
    if args.eval_strategy == "no" or step >= args.max_steps:
        return 0
    by_epoch = args.eval_strategy == "epoch"
    every = steps_per_epoch if by_epoch else needed(args.eval_steps)
    if every < 1:  # a share of all steps
        every = math.ceil(args.max_steps * every)
    due = {*range(int(every), args.max_steps + 1, int(every)), args.max_steps}  # always after the last step
    unit = steps_per_epoch if by_epoch else 1  # of eval_delay
    return sum(at > step and at / unit >= args.eval_delay for at in due) + int(args.eval_on_start)


def _kept(output_dir: Path, steps: int) -> str:
    """What a training that ends here leaves."""
    checkpoint = newest_sealed(output_dir)
    if checkpoint is None:
        return f"step 0 of {steps}, no checkpoint yet"
    return f"step {step_of(checkpoint)} of {steps} is saved in {checkpoint}"


def fit(
    config: RunConfig,
    args: TrainingArguments,
    model: torch.nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    steps_per_epoch: int,
    rows_of: RowsOf,
    before_step: BeforeStep = lambda step, moments, task: {},
    progress: Progress,
    eval_examples: Sequence[Example] | None = None,
    save_at: Collection[int] = (),
    pauses: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Train `model`'s adapter, save it with its tokenizer and logs in `output_dir`, and return the log history.

    Goes on from the newest checkpoint in `output_dir`, if there is one: the caller has seen that it is this run's.

    Args:
        args: `training_arguments(config, steps)`; made before the model, which ZeRO-3 shares out while it loads.
        save_at: steps after which a checkpoint is written besides those that `save_steps` names.
        pauses: how many pauses of each kind `before_step` will make.
    """
    output_dir = Path(needed(config.output_dir))
    checkpoint = last_checkpoint(output_dir)
    moments = load_moments(checkpoint) if checkpoint else None
    pad_token_id = tokenizer.pad_token_id
    live = LiveOptimizer(moments.learning_rate if moments else None)
    method = method_of(config)
    checkpoints = Checkpoints(live, method, config.save_total_limit, checkpoint)
    if step_of(checkpoint) >= args.max_steps:
        # no step is left; in the middle of an epoch, transformers would look for the end after one more
        steps_per_epoch = args.max_steps
    set_chat(tokenizer, config.template)  # it is saved with each adapter
    done = step_of(checkpoint)
    pauses = {**(pauses or {}), "evaluation": evaluations_after(done, args, steps_per_epoch)}
    with progress.task("training", args.max_steps, "steps", done, pauses) as task, without_back_doors():
        steps = Steps(task, save_at if config.save_strategy != "no" else ())
        trainer = RowTrainer(
            model=model,
            args=args,
            data_collator=lambda rows: collate(rows, pad_token_id),
            eval_dataset=eval_examples if config.eval_strategy != "no" else None,
            processing_class=tokenizer,
            callbacks=[live, SavedAdapters(config), checkpoints, steps, RunLog(task)],
            examples=examples,
            rows_of=rows_of,
            before_step=lambda step: before_step(step, lambda: live.moments(step), task),
            steps_per_epoch=steps_per_epoch,
            task=task,
        )
        if (used := method_of_accelerator(trainer.accelerator)) != method:
            raise DataflexError(f"accelerate would train {used}, where the configuration says {method}")
        try:
            with (
                disk_errors_of(f"output_dir {output_dir}", " from the last whole checkpoint"),
                no_code_from_disk(deepspeed=config.deepspeed is not None),
            ):
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if steps.interrupted is not None:
                raise steps.interrupted
        except Interrupted as stop:
            if processes.rank() == 0:
                stop.add_note(_kept(output_dir, args.max_steps))
            raise
        except DataflexError:
            raise
        except Exception as error:
            if checkpoint is None or (checkpoints.loaded and not isinstance(error, UnpicklingError)):
                raise
            if isinstance(error, UnpicklingError):
                reason = "a file in it holds more than tensors and plain values"
            else:
                reason = str(error).strip().partition("\n")[0]
            raise DataflexError(f"{checkpoint} is damaged ({reason}); {way_out(checkpoint)}") from error
    with disk_errors_of(f"output_dir {output_dir}", " from the last checkpoint"):
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)
        if processes.rank() == 0:
            describe_adapter(config, output_dir)
    return trainer.state.log_history
