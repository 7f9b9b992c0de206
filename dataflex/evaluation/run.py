"""The `eval` command: how well a model answers held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split, dated
from dataflex.data.rows import dataset_columns, row_numbers, subtasks_of, supervised_tokens
from dataflex.evaluation.figures import by_name, figures_of
from dataflex.evaluation.row_log import append, log_path, take_up
from dataflex.files import write_json, write_text
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.gradients.capture import Capture, make_reader
from dataflex.gradients.passes import batches_of_budget, forward_rows, losses_of
from dataflex.json_text import json_of_figures
from dataflex.masking import masked
from dataflex.model import compute_dtype, load_adapter, load_frozen_model, on_device
from dataflex.needs import check_needs
from dataflex.origin import origin
from dataflex.outline import outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Interrupted, Progress


@dataclass(frozen=True)
class Evaluation:
    """A model and held-out rows that are ready."""

    config: RunConfig
    capture: Capture
    split: Split
    path: Path


def evaluate(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Measure a model on the rows of `held_out`, or of the validation data, and write `output`; return its path.

    The model is `model_name_or_path` with the adapters of `adapter_name_or_path`. The loss is that of the answers,
    also where training learns prompts. `rows` gets a line of JSON a row. A killed command goes on from a log beside
    the output; its numbers are those of an uninterrupted one.
    """
    ready = prepare_evaluate(config, Plan("eval"), progress)
    config, split = ready.config, ready.split
    losses = _losses(ready, progress)
    if processes.rank() == 0:
        _write(config, split, losses)
        log_path(ready.path).unlink()
    processes.barrier()
    return ready.path


def prepare_evaluate(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Evaluation:
    """Find out and check everything that `eval` needs; nothing is written."""
    check_needs(config, "eval")
    if not plan.dry_run:
        processes.join(config.ddp_timeout)
    config = dated(config.changed(train_on_prompt=False))
    if config.held_out:
        config = config.changed(eval_dataset=config.held_out, val_size=0.0)
    tokenizer, splits = read_rows(config, ["eval"], plan, progress)
    sizes = outline(config, plan, [splits["eval"]], config.resumed_adapter)
    plan.needs_weights(config, sizes.base)
    dtype, model = compute_dtype(config), load_frozen_model(config)
    adapted = load_adapter(model, config.resumed_adapter, config) if config.resumed_adapter else model
    capture = make_reader(on_device(adapted), dtype, needed(tokenizer.pad_token_id), config.token_budget)
    return Evaluation(config, capture, splits["eval"], Path(needed(config.output)))


def _losses(ready: Evaluation, progress: Progress) -> np.ndarray:
    """[N] float32: the mean cross-entropy of each row's supervised tokens, on the first process."""
    config, split, log = ready.config, ready.split, log_path(ready.path)
    base_model, base_facts = base_model_fingerprint(config, progress)
    adapter = adapter_fingerprint(config.resumed_adapter) if config.resumed_adapter else None
    came_from = origin(
        config,
        "eval",
        {"held-out data": split.fingerprint, "base_model": base_model, "adapter": adapter},
        {"held-out data": split.facts, "base_model": base_facts},
    )
    taken = take_up(log, came_from, ready.capture.token_budget, config.overwrite) if processes.rank() == 0 else None
    budget, known = needed(processes.broadcast(taken))
    batches = batches_of_budget(ready.capture, split.examples, config.token_budget or budget)
    losses = np.full(len(split.examples), np.nan, dtype=np.float32)
    for index, entry in known.items():
        losses[index] = entry["loss"]
    left = [batch for batch in batches if not all(index in known for index in batch)]
    computed = forward_rows(ready.capture, split.examples, losses_of(ready.capture), progress, "held-out losses", left)
    try:
        for indices, values in computed:
            for share, part in processes.gather((indices, values.float().cpu().numpy())):
                losses[share] = part
                append(log, ({"index": i, "loss": float(v)} for i, v in zip(share, part, strict=True)))
    except Interrupted as stop:
        stop.add_note(f"the losses of {int((~np.isnan(losses)).sum())} of {len(losses)} rows are kept in {log}")
        raise
    return losses


def _write(config: RunConfig, split: Split, losses: np.ndarray) -> None:
    tokens, loss = supervised_tokens(split.examples), losses.astype(np.float64)
    names, source = dataset_columns(split.examples)
    datasets, subtasks = [names[index] for index in source.tolist()], subtasks_of(split.examples)
    found: dict[str, Any] = {
        "model": masked(config.model_name_or_path),
        "adapter": config.adapter_name_or_path,
        **figures_of(loss, tokens),
        "datasets": by_name(datasets, loss, tokens),
        "subtasks": by_name(subtasks, loss, tokens),
    }
    if config.rows is not None:
        columns = zip(row_numbers(split.examples), datasets, subtasks, loss, tokens, strict=True)
        lines = [
            {"row": int(row), "dataset": dataset, "subtask": subtask, "loss": float(value), "tokens": int(count)}
            for row, dataset, subtask, value, count in columns
        ]
        write_text(config.rows, "".join(json_of_figures(line) + "\n" for line in lines))
    write_json(needed(config.output), found)
