"""The `eval` command: how well a model answers held-out rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split, dated
from dataflex.data.rows import Example, dataset_columns, row_numbers, subtasks_of, supervised_tokens
from dataflex.evaluation.dataflow import export_rows
from dataflex.evaluation.figures import by_name, figures_of
from dataflex.evaluation.generation import answer_start, greedy, prompt_batches, prompt_of, stop_tokens, until_stop
from dataflex.evaluation.lm_eval import run_tasks
from dataflex.evaluation.matching import matches
from dataflex.evaluation.overlap import refuse_overlaps
from dataflex.evaluation.row_log import append, log_path, take_up
from dataflex.files import write_json, write_text
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.gradients.capture import Capture, make_reader
from dataflex.gradients.passes import batches_of_budget, forward_rows, losses_of
from dataflex.json_text import json_of_figures
from dataflex.masking import masked
from dataflex.model import compute_dtype, load_adapter, load_frozen_model, on_device
from dataflex.needs import check_needs, on_held_out
from dataflex.origin import Origin, origin
from dataflex.outline import outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Interrupted, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """A model and held-out rows that are ready."""

    config: RunConfig
    capture: Capture
    split: Split
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    """The tokens that end an answer."""
    path: Path


def evaluate(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Measure a model on the rows of `held_out`, or of the validation data, and write `output`; return its path.

    The model is `model_name_or_path` with the adapters of `adapter_name_or_path`. The loss is that of the answers,
    also where training learns prompts. The model answers each prompt greedily with at most `max_new_tokens` tokens, and
    the answer is compared with the row's. `rows` gets a line of JSON a row, `export` what another program takes. A
    killed command goes on from a log beside the output; its numbers are those of an uninterrupted one.
    """
    found, lines = _measured(config, progress)  # the model is gone before lm-eval loads it anew
    path = Path(needed(config.output))
    if processes.rank() == 0:
        if config.export == "lm-eval":
            found["lm_eval"] = run_tasks(config, progress)
        if config.export == "dataflow":
            export_rows(on_held_out(config), [line["row"] for line in lines], progress)
        if config.rows is not None:
            write_text(config.rows, "".join(json_of_figures(line) + "\n" for line in lines))
        write_json(path, found)
        log_path(path).unlink()
    processes.barrier()
    return path


def _measured(config: RunConfig, progress: Progress) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures, and a line for each row, on the first process."""
    ready = prepare_evaluate(config, Plan("eval"), progress)
    came_from = _origin_of(ready, progress)
    known = _measure(ready, came_from, progress)
    return _figures(ready, came_from, known) if processes.rank() == 0 else ({}, [])


def prepare_evaluate(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Evaluation:
    """Find out and check everything that `eval` needs; nothing is written."""
    check_needs(config, "eval")
    if not plan.dry_run:
        processes.join(config.ddp_timeout)
    own = config
    config = dated(on_held_out(config).changed(train_on_prompt=False))
    tokenizer, splits = read_rows(config, ["eval"], plan, progress)
    if not config.allow_overlap:
        _refuse_seen_rows(own, plan, progress, splits["eval"])
    stops = stop_tokens(tokenizer, config.template)
    if config.max_new_tokens:
        for example in splits["eval"].examples:
            answer_start(example)
    sizes = outline(config, plan, [splits["eval"]], config.resumed_adapter)
    plan.needs_weights(config, sizes.base)
    dtype, model = compute_dtype(config), load_frozen_model(config)
    adapted = load_adapter(model, config.resumed_adapter, config) if config.resumed_adapter else model
    capture = make_reader(on_device(adapted), dtype, needed(tokenizer.pad_token_id), config.token_budget)
    return Evaluation(config, capture, splits["eval"], tokenizer, stops, Path(needed(config.output)))


def _refuse_seen_rows(config: RunConfig, plan: Plan, progress: Progress, held_out: Split) -> None:
    """Raise a UsageError where held-out rows stand in the training or validation data that `config` names."""
    names: list[Literal["train", "eval"]] = []
    if config.dataset:
        names.append("train")
    if config.held_out and (config.eval_dataset or config.val_size):
        names.append("eval")
    shown = dict(plan.data)
    _, splits = read_rows(dated(config), names, plan, progress)
    plan.data = shown  # the dry run shows what is measured
    for name, split in splits.items():
        what = "the training data" if name == "train" else "the validation data"
        refuse_overlaps(held_out.examples, split.examples, what, progress)


def _origin_of(ready: Evaluation, progress: Progress) -> Origin:
    """What the figures come from."""
    config, split = ready.config, ready.split
    base_model, base_facts = base_model_fingerprint(config, progress)
    adapter = adapter_fingerprint(config.resumed_adapter) if config.resumed_adapter else None
    return origin(
        config,
        "eval",
        {"held-out data": split.fingerprint, "base_model": base_model, "adapter": adapter},
        {"held-out data": split.facts, "base_model": base_facts},
    )


def _start_log(ready: Evaluation, came_from: Origin) -> tuple[int, dict[int, dict[str, Any]]]:
    """The token budget, and what is known of each row already; the same in every process."""
    config, taken = ready.config, None
    if processes.rank() == 0:
        taken = take_up(log_path(ready.path), came_from, ready.capture.token_budget, config.overwrite)
    budget, known = needed(processes.broadcast(taken))
    return config.token_budget or budget, known


def _take(
    ready: Evaluation,
    name: str,
    rows: Sequence[Example],
    batches: Sequence[list[int]],
    compute: Callable[[list[Example], torch.Tensor, torch.Tensor], torch.Tensor],
    told: Callable[[np.ndarray], Any],
    known: dict[int, dict[str, Any]],
    progress: Progress,
) -> None:
    """Let `known` say `name` of every row on the first process: what `told` makes of the row's part of `compute`.

    Batches with a row of which it is not known yet are computed whole, as an uninterrupted run computes them.
    """
    log = log_path(ready.path)
    left = [batch for batch in batches if not all(name in known.get(index, {}) for index in batch)]
    try:
        for indices, values in forward_rows(ready.capture, rows, compute, progress, f"held-out {name}", left):
            for share, part in processes.gather((indices, values.cpu().numpy())):
                entries = {index: {name: told(value)} for index, value in zip(share, part, strict=True)}
                for index, entry in entries.items():
                    known.setdefault(index, {}).update(entry)
                append(log, ({"index": index, **entry} for index, entry in entries.items()))
    except Interrupted as stop:
        done = sum(name in entry for entry in known.values())
        stop.add_note(f"{name} of {done} of {len(rows)} rows is kept in {log}")
        raise


def _measure(ready: Evaluation, came_from: Origin, progress: Progress) -> dict[int, dict[str, Any]]:
    """The loss of each row and the text that the model generates, by index, on the first process."""
    capture, examples, tokens = ready.capture, ready.split.examples, ready.config.max_new_tokens
    budget, known = _start_log(ready, came_from)
    batches = batches_of_budget(capture, examples, budget)
    _take(ready, "loss", examples, batches, losses_of(capture), float, known, progress)
    if not tokens:
        return known
    prompts = [prompt_of(example) for example in examples]
    batches = prompt_batches(capture, prompts, tokens, budget)
    compute = greedy(capture, ready.stops, tokens)
    _take(ready, "generated", prompts, batches, compute, functools.partial(_text, ready), known, progress)
    return known


def _text(ready: Evaluation, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of an answer, up to the token that ends it."""
    kept = until_stop([int(token) for token in tokens], ready.stops)
    return str(ready.tokenizer.decode(kept, skip_special_tokens=True))


def _figures(
    ready: Evaluation, came_from: Origin, known: dict[int, dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures over all rows, and a line for each row."""
    config, split = ready.config, ready.split
    tokens = supervised_tokens(split.examples)
    loss = np.array([known[index]["loss"] for index in range(len(split.examples))])
    names, source = dataset_columns(split.examples)
    datasets, subtasks = [names[index] for index in source.tolist()], subtasks_of(split.examples)
    columns = zip(row_numbers(split.examples), datasets, subtasks, loss, tokens, strict=True)
    lines: list[dict[str, Any]] = [
        {"row": int(row), "dataset": dataset, "subtask": subtask, "loss": float(value), "tokens": int(count)}
        for row, dataset, subtask, value, count in columns
    ]
    shares: dict[str, np.ndarray] = {}
    if config.max_new_tokens:
        for index, (line, example) in enumerate(zip(lines, split.examples, strict=True)):
            start = answer_start(example)
            line["prompt"] = str(ready.tokenizer.decode(example.input_ids[:start], skip_special_tokens=True))
            line["answer"] = _text(ready, example.input_ids[start:])
            line["generated"] = known[index]["generated"]
            line |= {name: match(line["answer"], line["generated"]) for name, match in matches().items()}
        shares = {name: np.array([line[name] for line in lines], dtype=float) for name in matches()}  # None is NaN
    found = {
        "model": masked(config.model_name_or_path),
        "adapter": config.adapter_name_or_path,
        **figures_of(loss, tokens, shares),
        "datasets": by_name(datasets, loss, tokens, shares),
        "subtasks": by_name(subtasks, loss, tokens, shares),
        "fingerprints": dict(came_from.content),
    }
    return found, lines
