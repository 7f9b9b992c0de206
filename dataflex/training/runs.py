"""What every training command does around its steps, and the `warmup` and `train` commands themselves.

A run is loaded and checked first (`load_run`, which writes nothing), then begun (`begin`, the first write), trained
(`train_run`) and finished (`finish`).
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dataflex import processes
from dataflex.config import RunConfig, needed, require
from dataflex.data.examples import Split, dated, load_split
from dataflex.files import check_output_dir
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.gradients.probe import check_gradients
from dataflex.model import (
    add_lora,
    check_vocabulary,
    compute_dtype,
    load_adapter,
    load_frozen_model,
    load_tokenizer,
    on_device,
)
from dataflex.origin import Origin, origin
from dataflex.progress import SILENT, Progress
from dataflex.provenance import RunRecord, Stopwatch, find_record, open_record, read_record, was_begun
from dataflex.training.arguments import training_arguments
from dataflex.training.checkpoints import step_of
from dataflex.training.method import draws_random_numbers, method_of_arguments
from dataflex.training.plots import plot_loss
from dataflex.training.resume import check_method, check_resume, forget_later, last_checkpoint
from dataflex.training.schedule import random_rows, training_steps, warmup_steps
from dataflex.training.trainer import BeforeStep, RowsOf, fit


@dataclass(frozen=True)
class Run:
    """A training that is ready to begin."""

    config: RunConfig
    came_from: Origin
    args: TrainingArguments
    tokenizer: Any
    model: torch.nn.Module
    train: Split
    validation: Split | None
    watch: Stopwatch
    progress: Progress


def warmup(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `warmup_step` steps (or `max_steps`) on random rows; return the last checkpoint's folder."""
    steps = warmup_steps(config)
    _train_on_random_rows(config, "warmup", progress, lambda split: steps)
    return Path(needed(config.output_dir)) / f"checkpoint-{steps}"


def train(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `num_train_epochs` passes over `dataset` (or `max_steps`); return `output_dir`."""
    _train_on_random_rows(config, "train", progress, lambda split: training_steps(config, len(split.examples)))
    return Path(needed(config.output_dir))


def _train_on_random_rows(
    config: RunConfig, command: str, progress: Progress, steps_over: Callable[[Split], int]
) -> None:
    require(config, command)
    run = load_run(config, command, progress, steps_over, selects=False)
    if run is None:
        return
    count, per_step = len(run.train.examples), config.rows_per_step
    with begin(run) as record:
        history = train_run(
            run,
            steps_per_epoch=-(-count // per_step),
            rows_of=lambda step: random_rows(step, per_step, count, config.seed),
        )
        finish(run, record, history, rows=count)


def load_run(
    config: RunConfig, command: str, progress: Progress, steps_over: Callable[[Split], int], selects: bool
) -> Run | None:
    """Load and check everything that a training needs, and write nothing. None, and said, where it is finished.

    Args:
        steps_over: how many optimizer steps to take over the training rows; may refuse them.
        selects: whether rows are selected for the validation rows, so that the result depends on them; else they are
            read where `eval_strategy` asks for it.
    """
    check_run_folder(config)
    processes.join(config.ddp_timeout, config.deepspeed is not None)
    config = dated_run(config)
    watch = Stopwatch()
    with watch.phase("data"):
        tokenizer = load_tokenizer(config)
        split = load_split(config, tokenizer, "train", progress)
        validation = (
            load_split(config, tokenizer, "eval", progress) if selects or config.eval_strategy != "no" else None
        )
    steps = steps_over(split)
    came_from = origin_of(config, command, split, validation if selects else None, progress)
    if already_finished(config, came_from, progress):
        return None
    args = training_arguments(config, steps)
    checkpoint = None if _afresh(config) else last_checkpoint(Path(needed(config.output_dir)))
    if checkpoint is not None:
        check_method(checkpoint, method_of_arguments(args), lambda: draws_random_numbers(config))
    with watch.phase("model"):
        model = trainable_model(config, split)
        if validation is not None:
            check_vocabulary(model, validation.examples, config.template)
        check_gradients(model, compute_dtype(config), tokenizer.pad_token_id, split.examples, progress)
    return Run(config, came_from, args, tokenizer, model, split, validation, watch, progress)


@contextlib.contextmanager
def begin(run: Run) -> Iterator[RunRecord]:
    """Open the run's record, clear what the last checkpoint does not know of, and say where the run stands.

    The first thing a run writes; whatever can be wrong with its configuration has shown by now. Other runs are kept
    out of the folder until the block ends.
    """
    with open_record(run.config, run.came_from) as record:
        if processes.rank() == 0:
            output_dir = Path(needed(run.config.output_dir))
            step = step_of(last_checkpoint(output_dir))
            forget_later(output_dir, step)
            if step:
                run.progress.say(f"{output_dir}: going on from step {step}")
        processes.barrier()
        record.note(method=asdict(method_of_arguments(run.args)))
        yield record


def train_run(
    run: Run,
    *,
    steps_per_epoch: int,
    rows_of: RowsOf,
    before_step: BeforeStep = lambda step, moments: None,
    save_at: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Take the run's steps and return the log history. Arguments as for `fit`."""
    with run.watch.phase("training"):
        return fit(
            run.config,
            run.args,
            run.model,
            run.tokenizer,
            run.train.examples,
            steps_per_epoch=steps_per_epoch,
            rows_of=rows_of,
            before_step=before_step,
            progress=run.progress,
            eval_examples=run.validation.examples if run.validation else None,
            save_at=save_at,
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


def _afresh(config: RunConfig) -> bool:
    return config.overwrite or config.overwrite_output_dir


def check_run_folder(config: RunConfig) -> None:
    """Raise a UsageError unless `output_dir` is new, holds a run that may go on, or may be overwritten."""
    folder = Path(needed(config.output_dir))
    check_output_dir(folder, "output_dir", was_begun(folder) or _afresh(config))
    if _afresh(config):
        return
    check_resume(config.resume_from_checkpoint, folder)
    record = read_record(folder)
    if record is not None and not record.finished:
        last_checkpoint(folder)


def dated_run(config: RunConfig) -> RunConfig:
    """`config` with the day that dated prompts tell: a run that is taken up again keeps the day on which it began,
    and all processes have the first one's."""
    record = None if _afresh(config) else read_record(Path(needed(config.output_dir)))
    day = record.facts.get("prompt_date") if record else None
    return dated(config, processes.broadcast(day or str(datetime.date.today())))


def origin_of(
    config: RunConfig, command: str, split: Split, validation: Split | None, progress: Progress = SILENT
) -> Origin:
    """What this run comes from; another origin is another run.

    Args:
        validation: the rows that the result depends on: those that `dynamic` aims at.
    """
    base_model, base_facts = base_model_fingerprint(config, progress)
    adapter = config.resumed_adapter
    content = {
        "dataset": split.fingerprint,
        "eval_dataset": validation.fingerprint if validation else None,
        "base_model": base_model,
        "adapter": adapter_fingerprint(adapter) if adapter is not None else None,
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


def trainable_model(config: RunConfig, split: Split) -> torch.nn.Module:
    """The base model on its device with a fresh adapter, or with the one to go on from."""
    frozen = load_frozen_model(config)
    check_vocabulary(frozen, split.examples, config.template)
    if config.resumed_adapter is None:
        return on_device(add_lora(frozen, config))
    return on_device(load_adapter(frozen, config.resumed_adapter, config))
