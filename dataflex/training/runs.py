"""The `warmup` and `train` commands: LoRA fine-tuning on random rows, or on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex.config import RunConfig, require
from dataflex.data.examples import Split, load_split
from dataflex.errors import UsageError
from dataflex.files import check_output_dir
from dataflex.model import (
    add_lora,
    check_vocabulary,
    compute_dtype,
    device,
    load_adapter,
    load_base_model,
    load_tokenizer,
)
from dataflex.progress import SILENT, Progress
from dataflex.provenance import Stopwatch, write_run
from dataflex.training.plots import plot_loss
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
    require(config, command, "model_name_or_path", "dataset", "output_dir")
    refuse_unsupported(config)
    check_output_dir(config.output_dir, "output_dir", config.overwrite or config.overwrite_output_dir)
    watch = Stopwatch()
    with watch.phase("data"):
        tokenizer = load_tokenizer(config)
        split = load_split(config, tokenizer, "train", progress)
        validation = load_split(config, tokenizer, "eval", progress) if config.eval_strategy != "no" else None
    with watch.phase("model"):
        model = trainable_model(config, split)
    count = len(split.examples)
    rows_per_step = config.rows_per_step
    with watch.phase("training"):
        history = fit(
            config,
            model,
            tokenizer,
            split.examples,
            total_steps=steps or training_steps(config, count),
            steps_per_epoch=-(-count // rows_per_step),
            rows_for_step=lambda step, _: random_rows(step, rows_per_step, count, config.seed),
            progress=progress,
            eval_examples=validation.examples if validation else None,
        )
    if config.plot_loss:
        plot_loss(history, [], Path(config.output_dir) / "training_loss.png")
    write_run(config, command, watch, rows=len(split.examples))


def trainable_model(config: RunConfig, split: Split) -> torch.nn.Module:
    """The base model on its device with a fresh adapter, or with the one to go on from."""
    base: Any = load_base_model(config, compute_dtype(config))
    check_vocabulary(base, split.examples, config.template)
    if config.adapter_name_or_path is None:
        return add_lora(base, config).to(device())
    if len(config.adapter_name_or_path) > 1:
        raise UsageError("adapter_name_or_path names several adapters; merge all but the last into the model first")
    return load_adapter(base, config.adapter_name_or_path[0], config).to(device())


def refuse_unsupported(config: RunConfig) -> None:
    """Raise a UsageError for what is accepted in a YAML but cannot be run yet."""
    if config.deepspeed is not None:
        raise UsageError("deepspeed: runs under DeepSpeed are not supported yet; remove the key (deepspeed=null)")
    if config.world_size > 1:
        raise UsageError("several processes are not supported yet; start one")
