"""The `warmup` and `train` commands: LoRA fine-tuning on random rows, or on all of them."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch

from dataflex import processes
from dataflex.config import RunConfig, require
from dataflex.data.examples import Split, dated, load_split
from dataflex.files import check_output_dir
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.model import (
    add_lora,
    check_vocabulary,
    load_adapter,
    load_frozen_model,
    load_tokenizer,
    on_device,
)
from dataflex.origin import Origin, origin
from dataflex.progress import SILENT, Progress
from dataflex.provenance import FILE_NAME, LOCK_NAME, RunRecord, Stopwatch, find_record, open_record, read_record
from dataflex.training.arguments import training_arguments
from dataflex.training.plots import plot_loss
from dataflex.training.resume import check_resume, forget_later, last_checkpoint, step_of
from dataflex.training.schedule import random_rows, training_steps, warmup_steps
from dataflex.training.trainer import fit


def warmup(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `warmup_step` steps (or `max_steps`) on random rows; return the last checkpoint's folder."""
    steps = warmup_steps(config)
    _train_on_random_rows(config, "warmup", progress, steps)
    return Path(config.output_dir) / f"checkpoint-{steps}"


def train(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train for `num_train_epochs` passes over `dataset` (or `max_steps`); return `output_dir`."""
    _train_on_random_rows(config, "train", progress, None)
    return Path(config.output_dir)


def _train_on_random_rows(config: RunConfig, command: str, progress: Progress, steps: int | None) -> None:
    require(config, command)
    check_run_folder(config)
    processes.join(config.ddp_timeout, config.deepspeed is not None)
    config = dated_run(config)
    watch = Stopwatch()
    with watch.phase("data"):
        tokenizer = load_tokenizer(config)
        split = load_split(config, tokenizer, "train", progress)
        validation = load_split(config, tokenizer, "eval", progress) if config.eval_strategy != "no" else None
    came_from = origin_of(config, command, split, None, progress)
    if already_finished(config, came_from, progress):
        return
    count = len(split.examples)
    rows_per_step = config.rows_per_step
    args = training_arguments(config, steps or training_steps(config, count))
    with watch.phase("model"):
        model = trainable_model(config, split)
    record = begin(config, came_from, progress)
    with watch.phase("training"):
        history = fit(
            config,
            args,
            model,
            tokenizer,
            split.examples,
            steps_per_epoch=-(-count // rows_per_step),
            rows_for_step=lambda step, _: random_rows(step, rows_per_step, count, config.seed),
            progress=progress,
            eval_examples=validation.examples if validation else None,
        )
    if config.plot_loss and processes.rank() == 0:
        plot_loss(history, [], Path(config.output_dir) / "training_loss.png")
    record.note(finished=True, seconds=watch.seconds, rows=count, steps=args.max_steps)


def check_run_folder(config: RunConfig) -> None:
    """Raise a UsageError unless `output_dir` is new, holds a run that may go on, or may be overwritten."""
    folder = Path(config.output_dir)
    begun = (folder / FILE_NAME).is_file() or (
        folder.is_dir() and {path.name for path in folder.iterdir()} == {LOCK_NAME}
    )
    afresh = config.overwrite or config.overwrite_output_dir
    check_output_dir(folder, "output_dir", begun or afresh)
    if not afresh:
        check_resume(config.resume_from_checkpoint, folder)


def dated_run(config: RunConfig) -> RunConfig:
    """`config` with the day that dated prompts tell: a run that is taken up again keeps the day on which it began,
    and all processes have the first one's."""
    afresh = config.overwrite or config.overwrite_output_dir
    record = None if afresh else read_record(Path(config.output_dir))
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


def begin(config: RunConfig, came_from: Origin, progress: Progress) -> RunRecord:
    """Open the run's record, clear what the last checkpoint does not know of, and say where the run stands.

    The first thing a run writes; whatever can be wrong with its configuration has shown by now.
    """
    record = open_record(config, came_from)
    if processes.rank() == 0:
        output_dir = Path(config.output_dir)
        step = step_of(last_checkpoint(output_dir))
        forget_later(output_dir, step)
        if step:
            progress.say(f"{output_dir}: going on from step {step}")
    processes.barrier()
    return record


def trainable_model(config: RunConfig, split: Split) -> torch.nn.Module:
    """The base model on its device with a fresh adapter, or with the one to go on from."""
    frozen = load_frozen_model(config)
    check_vocabulary(frozen, split.examples, config.template)
    if config.resumed_adapter is None:
        return on_device(add_lora(frozen, config))
    return on_device(load_adapter(frozen, config.resumed_adapter, config))
