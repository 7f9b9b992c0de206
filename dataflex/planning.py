"""What a command would do, found out without the network and without writing: `--dry-run`.

The weights are read where they are here and small, to take two rows' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataflex.config import RunConfig, needed, require
from dataflex.data.examples import Split, load_split, split_names
from dataflex.data.preview import first_row, summary
from dataflex.errors import UsageError
from dataflex.files import check_output_file
from dataflex.keys import TRAINS
from dataflex.progress import SILENT, Progress
from dataflex.selectors.table import make_selector

HEADER_BYTES = 12  # a row: its number and its supervised tokens
MAX_TRIED_PARAMETERS = 1 << 30  # of a base model that a dry run loads: 4 GiB in float32


@dataclass
class Plan:
    """The findings of a dry run; what could not be found out says why in `unknown`."""

    command: str
    config: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def plan(config: RunConfig, command: str, progress: Progress = SILENT) -> Plan:
    """Check `config` for `command` and say what it would do.

    Raises:
        UsageError: for whatever would stop the command before it writes anything, as far as that shows
            without the weights.
    """
    require(config, command)
    result = Plan(command, config.model_dump(mode="json", exclude_none=True))
    _check_outputs(config, command, result)
    if command == "dynamic":
        make_selector(config.selector)
    splits = _load_splits(config, command, result, progress)
    if command in TRAINS:
        result.schedule = _schedule(config, command, splits.get("train"))
    if command in (*TRAINS, "grads", "bench"):
        _measure(config, command, splits, result)
    if command in (*TRAINS, "grads") and splits:
        _try_gradients(config, command, splits, result, progress)
    return result


def _check_outputs(config: RunConfig, command: str, result: Plan) -> None:
    from dataflex.training.runs import check_run_folder

    if command in TRAINS:
        check_run_folder(config)
    elif command == "merge":
        from dataflex.merging import check_merge

        result.unknown += check_merge(config)
    elif command != "bench":
        check_output_file(needed(config.output), config.overwrite or command == "grads")


def _load_splits(config: RunConfig, command: str, result: Plan, progress: Progress) -> dict[str, Split]:
    from dataflex.model import load_tokenizer

    if command in ("grads", "bench"):
        names: list[Literal["train", "eval"]] = [config.split]
    elif command in TRAINS:
        names = ["train", "eval"] if command == "dynamic" or config.eval_strategy != "no" else ["train"]
    elif command == "score" and config.exact:
        names = ["train", "eval"]
    else:
        return {}
    if not Path(config.dataset_dir).exists() and "dataset_dir" not in config.model_fields_set:
        result.unknown.append(f"rows: there is no folder {config.dataset_dir}/ here; set dataset_dir")
        return {}
    try:
        tokenizer = load_tokenizer(config, local_only=True)
    except UsageError as error:
        result.unknown.append(f"rows: they are counted with the tokenizer. {error}")
        _check_sources(config, names)
        return {}
    splits: dict[str, Split] = {name: load_split(config, tokenizer, name, progress, keep=False) for name in names}
    for name, split in splits.items():
        result.data[name] = {**summary(split.report), "example": first_row(split.examples, tokenizer)}
    return splits


def _check_sources(config: RunConfig, names: Sequence[str]) -> None:
    """Without a tokenizer the datasets and the template can still be looked up."""
    from dataflex.data.catalog import find_sources
    from dataflex.data.templates import find_template

    if config.template is not None:
        find_template(config.template)
    for name in names:
        find_sources(split_names(config, name), config.dataset_dir)


def _schedule(config: RunConfig, command: str, train: Split | None) -> dict[str, Any]:
    from dataflex.dynamic_run import check_selection_size
    from dataflex.training.schedule import dynamic_schedule, training_steps, warmup_steps

    if command == "dynamic":
        schedule = dynamic_schedule(config)
        if train is not None:
            check_selection_size(schedule, train)
        return {
            "steps": schedule.total_steps,
            "rows_per_step": schedule.rows_per_step,
            "warmup_steps": min(schedule.warmup_step, schedule.total_steps),
            "selections": schedule.selection_steps,
            "rows_per_selection": schedule.rows_per_selection,
        }
    if command == "warmup":
        return {"steps": warmup_steps(config), "rows_per_step": config.rows_per_step}
    if train is None:
        return {"rows_per_step": config.rows_per_step}
    return {"steps": training_steps(config, len(train.examples)), "rows_per_step": config.rows_per_step}


def _measure(config: RunConfig, command: str, splits: dict[str, Split], result: Plan) -> None:
    """Parameter counts from the architecture alone, and the bytes that follow from them."""
    import torch
    from transformers import AutoModelForCausalLM

    from dataflex.cost import (
        free_memory,
        gradient_flops,
        gradient_memory,
        multiplied_weights,
        shape_of,
        token_budget_for,
        training_memory,
    )
    from dataflex.lora import layout, lora_pairs
    from dataflex.model import add_lora, compute_dtype, device, load_model_config
    from dataflex.projection.table import check_projector, projector_class
    from dataflex.store.layout import RowLayout

    try:
        architecture = load_model_config(config, local_only=True)
    except UsageError as error:
        result.unknown.append(f"sizes: they follow from the model's config. {error}")
        return
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
        base_parameters, weights = base.num_parameters(), multiplied_weights(base)
        adapter = sum(slot.size for slot in layout(lora_pairs(add_lora(base, config))))
    result.sizes = {"base_parameters": base_parameters, "adapter_parameters": adapter}
    dim = projector_class(config.projector).width(adapter, config.proj_dim or 0)
    rows = {name: len(split.examples) for name, split in splits.items()}
    if command == "grads" or (command == "dynamic" and not config.is_exact):
        layout_of_rows = RowLayout(config.store_dtype, dim)
        result.sizes["store_bytes"] = sum(rows.values()) * (layout_of_rows.row_bytes + HEADER_BYTES)
    if command in ("grads", "bench", "dynamic") and not config.is_exact:
        check_projector(config.projector, needed(config.proj_dim), device())
    shape = shape_of(architecture, base_parameters, adapter, compute_dtype(config).itemsize)
    if shape is None:
        result.unknown.append(f"peak memory: {architecture.model_type} does not say its layers' sizes")
        return
    peaks = []
    longest = max((max(split.report.lengths, default=0) for split in splits.values()), default=0)
    if command != "warmup" and command != "train":
        free = max(0, free_memory(device()) - shape.base * shape.itemsize)  # once the model is there
        budget = config.token_budget or token_budget_for(shape, free, device().type)
        result.sizes["token_budget"] = budget
        peaks.append(gradient_memory(shape, max(budget, longest)))
        if command == "bench":
            peaks.append(training_memory(shape, max(budget, longest), checkpointing=False))
    if command in ("grads", "bench", "dynamic") and splits:
        passes = len(result.schedule["selections"]) if command == "dynamic" else 1
        tokens = passes * sum(sum(split.report.lengths) for split in splits.values())
        supervised = passes * sum(split.report.supervised_tokens for split in splits.values())
        result.sizes["gradient_flops"] = gradient_flops(*weights, adapter, tokens, supervised)
    if command in TRAINS and splits:
        checkpointing = config.gradient_checkpointing and not config.disable_gradient_checkpointing
        peaks.append(training_memory(shape, config.per_device_train_batch_size * longest, checkpointing))
    if peaks:
        result.sizes["peak_memory_bytes"] = max(peaks)


def _try_gradients(config: RunConfig, command: str, splits: dict[str, Split], result: Plan, progress: Progress) -> None:
    """Take two rows' gradients as the command will before it writes anything."""
    from dataflex.gradients.collect import checkpoint_capture
    from dataflex.gradients.probe import check_capture, check_gradients
    from dataflex.model import compute_dtype, load_tokenizer
    from dataflex.training.runs import trainable_model

    if not Path(needed(config.model_name_or_path)).exists():
        return result.unknown.append("gradients: they are tried once the model's weights are here")
    if result.sizes["base_parameters"] > MAX_TRIED_PARAMETERS:
        return result.unknown.append("gradients: the command tries two rows once it has loaded the model")
    pad_token_id = load_tokenizer(config, local_only=True).pad_token_id
    if command == "grads":
        capture = checkpoint_capture(config, Path(needed(config.checkpoint)[0]), pad_token_id)
        check_capture(capture, splits[config.split].examples, progress)
    else:
        model = trainable_model(config, splits["train"])
        check_gradients(model, compute_dtype(config), pad_token_id, splits["train"].examples, progress)
