"""What every training command does around its steps, and the `warmup` and `train` commands themselves.

A run is prepared first (`prepare_training`, which writes nothing), then begun (`begin`, the first write), trained
(`train_run`) and finished (`finish`).
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.cost import training_memory
from dataflex.data.examples import Split, dated
from dataflex.files import check_room
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.gradients.probe import TRYING, check_gradients, is_shared_out
from dataflex.model import add_lora, compute_dtype, load_adapter, load_frozen_model, on_device
from dataflex.needs import check_needs
from dataflex.origin import Origin, origin
from dataflex.outline import Outline, longest_of, note_peak, note_training, outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Progress, Task
from dataflex.provenance import RunRecord, Stopwatch, find_record, open_record, read_record, was_begun
from dataflex.training.arguments import check_schedule, training_arguments
from dataflex.training.checkpoints import step_of
from dataflex.training.deepspeed_file import check_deepspeed
from dataflex.training.method import draws_random_numbers, method_of
from dataflex.training.moments import AdamMoments
from dataflex.training.plots import plot_loss
from dataflex.training.resume import check_method, forget_later, last_checkpoint
from dataflex.training.schedule import random_rows, training_steps, warmup_steps
from dataflex.training.trainer import BeforeStep, Figures, RowsOf, fit


@dataclass(frozen=True)
class Run:
    """A training that is ready to begin."""

    config: RunConfig
    came_from: Origin | None
    """None in a dry run of a run that has not begun."""
    args: TrainingArguments
    tokenizer: Any
    model: torch.nn.Module
    train: Split
    validation: Split | None
    watch: Stopwatch
    progress: Progress

    @property
    def is_shared_out(self) -> bool:
        """Whether ZeRO-3 has shared out the model, which then runs only inside its training."""
        return is_shared_out(self.model)

    def check_gradients(self) -> None:
        """Raise a UsageError if gradients of single rows cannot be taken of the model."""
        dtype, pad_token_id = compute_dtype(self.config), self.tokenizer.pad_token_id
        self.progress.say(TRYING)
        check_gradients(self.model, dtype, pad_token_id, self.train.examples, self.progress)


def warmup(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `warmup_step` steps (or `max_steps`) on random rows; return the last checkpoint's folder."""
    run = prepare_warmup(config, Plan("warmup"), progress)
    if run is not None:
        _train_on_random_rows(run)
    return Path(needed(config.output_dir)) / f"checkpoint-{warmup_steps(config)}"


def train(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `num_train_epochs` passes over `dataset` (or `max_steps`); return `output_dir`."""
    run = prepare_train(config, Plan("train"), progress)
    if run is not None:
        _train_on_random_rows(run)
    return Path(needed(config.output_dir))


def _train_on_random_rows(run: Run) -> None:
    count, per_step, seed = len(run.train.examples), run.config.rows_per_step, run.config.seed
    with begin(run) as record:
        history = train_run(
            run,
            steps_per_epoch=-(-count // per_step),
            rows_of=lambda step: random_rows(step, per_step, count, seed),
        )
        finish(run, record, history, rows=count)


def prepare_warmup(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Run | None:
    """`prepare_training` for `warmup`."""
    check_needs(config, "warmup")
    plan.schedule = {"steps": warmup_steps(config), "rows_per_step": config.rows_per_step}
    return prepare_training(config, plan, progress, lambda split: warmup_steps(config))


def prepare_train(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Run | None:
    """`prepare_training` for `train`."""
    check_needs(config, "train")
    plan.schedule = {"rows_per_step": config.rows_per_step}

    def steps_over(split: Split) -> int:
        steps = training_steps(config, len(split.examples))
        plan.schedule = {"steps": steps, "rows_per_step": config.rows_per_step}
        return steps

    return prepare_training(config, plan, progress, steps_over)


def prepare_training(
    config: RunConfig,
    plan: Plan,
    progress: Progress,
    steps_over: Callable[[Split], int],
    note: Callable[[Outline, Sequence[Split]], list[int]] | None = None,
) -> Run | None:
    """Find out and check everything that a training needs, and write nothing. None, and said, where it is finished.

    Args:
        steps_over: how many optimizer steps to take over the training rows; may refuse them.
        note: checks and notes the gradient passes of a run that selects rows for the validation rows, so that its
            result depends on them, and returns the bytes at their peaks. Without it the validation rows are read where
            `eval_strategy` asks for them.
    """
    check_schedule(config)
    if config.deepspeed is not None:
        check_deepspeed(config)
    if not plan.dry_run:
        processes.join(config.ddp_timeout, config.deepspeed is not None)
    config = dated_run(config)
    watch = Stopwatch()
    selects = note is not None
    with watch.phase("data"):
        names: list[Literal["train", "eval"]] = ["train"]
        if selects or config.eval_strategy != "no":
            names.append("eval")
        tokenizer, splits = read_rows(config, names, plan, progress)
    split, validation = splits["train"], splits.get("eval")
    steps = steps_over(split)
    came_from = None
    if not plan.dry_run or was_begun(Path(needed(config.output_dir))):  # else a dry run has nothing to compare it with
        keep = not plan.dry_run
        came_from = origin_of(config, plan.command, split, validation if selects else None, progress, keep)
        if already_finished(config, came_from, progress):
            return None
    layers = config.grad_layers if selects else None
    sizes = outline(config, plan, splits.values(), config.resumed_adapter, layers)
    peaks = note(sizes, list(splits.values())) if note is not None else []
    note_training(config, plan, sizes, split, steps)
    _check_room_for(config, sizes, steps)
    note_peak(plan, sizes, [*peaks, *_training_peak(config, sizes, splits.values())])
    args = training_arguments(config.model_copy(update={"deepspeed": None}) if plan.dry_run else config, steps)
    checkpoint = None if config.starts_afresh else last_checkpoint(Path(needed(config.output_dir)))
    if checkpoint is not None:
        check_method(checkpoint, method_of(config), lambda: draws_random_numbers(config))
    plan.needs_weights(config, sizes.base)
    with watch.phase("model"):
        model = trainable_model(config)
        run = Run(config, came_from, args, tokenizer, model, split, validation, watch, progress)
        if not run.is_shared_out:
            run.check_gradients()
    return run


def _check_room_for(config: RunConfig, sizes: Outline, steps: int) -> None:
    """Raise a UsageError where the disk of `output_dir` has no room for the checkpoints of a run of `steps` steps.

    A checkpoint holds each LoRA tensor and both its moments in float32, and the moments once more where it can be
    resumed; one more than are kept is there while a new one is written.
    """
    folder = Path(needed(config.output_dir))
    every = steps if config.save_strategy != "steps" else _whole_steps(config.save_steps, steps)
    written = -(-steps // every)
    kept = min(written, (config.save_total_limit or written) + 1)
    copies = 1 + 2 + (0 if config.save_only_model else 2)
    there = sum(512 * path.stat().st_blocks for path in folder.glob("checkpoint-*/*"))
    wanted = (kept * copies + 1) * 4 * sizes.adapter  # and the adapter in output_dir itself
    check_room(folder / "run.json", f"output_dir {folder}", wanted - there, "lower save_total_limit, or set one")


def _whole_steps(value: float, steps: int) -> int:
    """A number of steps, or a share of them below 1, as Trainer rounds it."""
    return max(1, math.ceil(value * steps) if value < 1 else int(value))


def _training_peak(config: RunConfig, sizes: Outline, splits: Iterable[Split]) -> list[int]:
    """The bytes at the peak of a training step; none where the model does not say its layers' sizes."""
    if sizes.shape is None:
        return []
    checkpointing = config.gradient_checkpointing and not config.disable_gradient_checkpointing
    tokens = config.per_device_train_batch_size * longest_of(splits)
    return [training_memory(sizes.shape, tokens, checkpointing)]


@contextlib.contextmanager
def begin(run: Run) -> Iterator[RunRecord]:
    """Open the run's record, clear what the last checkpoint does not know of, and say where the run stands.

    The first thing a run writes; whatever can be wrong with its configuration has shown by now. Other runs are kept
    out of the folder until the block ends.
    """
    with open_record(run.config, needed(run.came_from)) as record:
        if processes.rank() == 0:
            output_dir = Path(needed(run.config.output_dir))
            step = step_of(last_checkpoint(output_dir))
            forget_later(output_dir, step)
            if step:
                run.progress.say(f"{output_dir}: going on from step {step}")
        processes.barrier()
        record.note(method=asdict(method_of(run.config)))
        yield record


def train_run(
    run: Run,
    *,
    steps_per_epoch: int,
    rows_of: RowsOf,
    before_step: BeforeStep = lambda step, moments, task: {},
    save_at: Collection[int] = (),
    pauses: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Take the run's steps and return the log history. Arguments as for `fit`.

    Under ZeRO-3 the gradients are tried here, before the first step.
    """
    untried = [run.check_gradients] if run.is_shared_out else []

    def prepare_step(step: int, moments: Callable[[], AdamMoments], task: Task) -> Figures:
        while untried:
            untried.pop()()
        return before_step(step, moments, task)

    with run.watch.phase("training"):
        return fit(
            run.config,
            run.args,
            run.model,
            run.tokenizer,
            run.train.examples,
            steps_per_epoch=steps_per_epoch,
            rows_of=rows_of,
            before_step=prepare_step,
            progress=run.progress,
            eval_examples=run.validation.examples if run.validation else None,
            save_at=save_at,
            pauses=pauses,
        )


def finish(
    run: Run,
    record: RunRecord,
    history: Sequence[dict[str, Any]],
    selection_steps: Sequence[int] = (),
    **facts: Any,
) -> None:
    """Draw the loss, and put on record that the run is finished."""
    if run.config.plot_loss and processes.rank() == 0:
        plot_loss(history, selection_steps, Path(needed(run.config.output_dir)) / "training_loss.png")
    record.note(finished=True, seconds=run.watch.seconds, steps=run.args.max_steps, **facts)
    processes.barrier()


def dated_run(config: RunConfig) -> RunConfig:
    """`config` with the day that dated prompts tell: a run that is taken up again keeps the day on which it began,
    and all processes have the first one's."""
    record = None if config.starts_afresh else read_record(Path(needed(config.output_dir)))
    day = record.facts.get("prompt_date") if record else None
    return dated(config, processes.broadcast(day or str(datetime.date.today())))


def origin_of(
    config: RunConfig,
    command: str,
    split: Split,
    validation: Split | None,
    progress: Progress = SILENT,
    keep: bool = True,
) -> Origin:
    """What this run comes from; another origin is another run.

    Args:
        validation: the rows that the result depends on: those that `dynamic` aims at.
        keep: add the hashes of files that are read to the cache.
    """
    base_model, base_facts = base_model_fingerprint(config, progress, keep)
    adapter = config.resumed_adapter
    content = {
        "dataset": split.fingerprint,
        "eval_dataset": validation.fingerprint if validation else None,
        "base_model": base_model,
        "adapter": adapter_fingerprint(adapter, keep) if adapter is not None else None,
    }
    facts = {
        "dataset": split.facts,
        "eval_dataset": validation.facts if validation else {},
        "base_model": base_facts,
        "adapter": {"adapter_name_or_path": adapter},
    }
    return origin(config, command, content, facts)


def already_finished(config: RunConfig, came_from: Origin, progress: Progress) -> bool:
    """True, and said, if `output_dir` holds this run complete. Raises a UsageError if it holds another run."""
    record = find_record(config, came_from)
    if record is None or not record.finished:
        return False
    progress.say(f"{config.output_dir}: this run is finished; --overwrite starts it afresh")
    return True


def trainable_model(config: RunConfig) -> torch.nn.Module:
    """The base model on its device with a fresh adapter, or with the one to go on from."""
    frozen = load_frozen_model(config)
    if config.resumed_adapter is None:
        return on_device(add_lora(frozen, config))
    return on_device(load_adapter(frozen, config.resumed_adapter, config))
