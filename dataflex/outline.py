"""A model without numbers, and the bytes that follow from its shapes: what a command will write and hold in memory.

Made before any weights are loaded, so that an adapter that does not fit, a token that the model lacks and a disk that
is too small show in seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataflex.adapters import fit_vocabulary, read_adapter
from dataflex.config import RunConfig
from dataflex.cost import (
    SHARE_OF_SPEED,
    Shape,
    free_memory,
    gradient_flops,
    gradient_memory,
    matmul_speed,
    multiplied_weights,
    shape_of,
    token_budget_for,
    training_flops,
)
from dataflex.data.examples import Split
from dataflex.folding import check_foldable
from dataflex.lora import Slot, layout, lora_pairs, pairs_of_layers
from dataflex.model import add_lora, check_vocabulary, compute_dtype, device, load_adapter, load_skeleton
from dataflex.planning import Plan
from dataflex.projection.table import projector_class
from dataflex.store.layout import RowLayout

HEADER_BYTES = 12  # a row: its number and its supervised tokens


@dataclass(frozen=True)
class Outline:
    """The sizes of a base model with one adapter."""

    base: int
    """Parameters of the base model."""
    adapter: int
    """Parameters of the LoRA pairs."""
    slots: list[Slot]
    """Of the pairs whose gradients are taken; their parameters have no numbers."""
    multiplied: tuple[int, int]
    """As `multiplied_weights`."""
    shape: Shape | None
    """None where the model's configuration does not say its layers' sizes."""
    model_type: str

    @property
    def direction(self) -> int:
        """P, the parameters of the pairs whose gradients are taken."""
        return self.slots[-1].offset + self.slots[-1].size


def outline(
    config: RunConfig, plan: Plan, splits: Iterable[Split], adapter: str | Path | None = None, layers: str | None = None
) -> Outline:
    """The outline of the base model with the adapter in the folder `adapter`, or with a new one; noted in `plan`.

    Args:
        layers: those whose gradients are taken, as `grad_layers` has them; all when left out.

    Raises:
        UsageError: where the adapter does not fit the model, or a row of `splits` has a token that the model lacks.
    """
    with plan.needs_hub(config, "sizes: they follow from the model's config"):
        base = load_skeleton(config, local_only=plan.dry_run)
    architecture, parameters, multiplied = base.config, base.num_parameters(), multiplied_weights(base)
    for path in config.folded_adapters:
        check_foldable(base, path)
        fit_vocabulary(base, read_adapter(path))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch warns that a tensor without numbers takes none
        wrapped = add_lora(base, config) if adapter is None else load_adapter(base, adapter, config)
    for split in splits:
        check_vocabulary(wrapped, split.examples, config.template)
    pairs = lora_pairs(wrapped)
    taken = pairs if layers is None else pairs_of_layers(pairs, layers)
    size = sum(slot.size for slot in layout(pairs))
    plan.sizes |= {"base_parameters": parameters, "adapter_parameters": size}
    shape = shape_of(architecture, parameters, size, compute_dtype(config).itemsize)
    return Outline(parameters, size, layout(taken), multiplied, shape, architecture.model_type)


def note_store(
    config: RunConfig, plan: Plan, sizes: Outline, splits: Iterable[Split], existing: Iterable[Path] = ()
) -> int:
    """Note the bytes of the gradient stores of `splits`, one each; how many are still to be written.

    Args:
        existing: stores that are gone on with or replaced; their bytes are on the disk already.
    """
    dim = projector_class(config.projector).width(sizes.direction, config.proj_dim or 0)
    rows = sum(len(split.examples) for split in splits)
    plan.sizes["store_bytes"] = rows * (RowLayout(config.store_dtype, dim).row_bytes + HEADER_BYTES)
    return plan.sizes["store_bytes"] - sum(512 * path.stat().st_blocks for path in existing if path.exists())


def note_peak(plan: Plan, sizes: Outline, peaks: Sequence[int]) -> None:
    """Note the largest of `peaks` (bytes) in `plan`."""
    if sizes.shape is None:
        plan.unknown.append(f"peak memory: {sizes.model_type} does not say its layers' sizes")
    elif peaks:
        plan.sizes["peak_memory_bytes"] = max(peaks)


def longest_of(splits: Iterable[Split]) -> int:
    """Tokens of the longest row."""
    return max((max(split.report.lengths, default=0) for split in splits), default=0)


def note_gradient_pass(
    config: RunConfig, plan: Plan, sizes: Outline, splits: Sequence[Split], passes: int = 1
) -> list[int]:
    """Note the token budget and the arithmetic of gradient passes; the bytes at their peak, none where not known."""
    tokens = passes * sum(sum(split.report.lengths) for split in splits)
    supervised = passes * sum(split.report.supervised_tokens for split in splits)
    flops = gradient_flops(*sizes.multiplied, sizes.direction, tokens, supervised)
    plan.sizes["gradient_flops"] = flops
    _note_seconds(config, plan, "gradient", flops)
    if sizes.shape is None:
        return []
    free = max(0, free_memory(device()) - sizes.shape.base * sizes.shape.itemsize)  # once the model is there
    budget = config.token_budget or token_budget_for(sizes.shape, free, device().type)
    plan.sizes["token_budget"] = budget
    return [gradient_memory(sizes.shape, max(budget, longest_of(splits)))]


def note_training(config: RunConfig, plan: Plan, sizes: Outline, train: Split, steps: int) -> None:
    """Note the arithmetic of training for `steps` steps, on rows that are as long as the mean of `train`."""
    mean = sum(train.report.lengths) / max(1, len(train.report.lengths))
    tokens = round(steps * config.rows_per_step * mean)
    checkpointing = config.gradient_checkpointing and not config.disable_gradient_checkpointing
    flops = training_flops(*sizes.multiplied, sizes.adapter, tokens, checkpointing)
    plan.sizes["training_flops"] = flops
    _note_seconds(config, plan, "training", flops)


def _note_seconds(config: RunConfig, plan: Plan, what: str, flops: int) -> None:
    """Note how long `flops` take here, by the speed of a matrix product; only a dry run asks. Processes share the work
    of several GPUs, and the cores of one machine."""
    if plan.dry_run:
        machines = config.world_size if device().type == "cuda" else 1
        speed = SHARE_OF_SPEED * machines * matmul_speed(device(), compute_dtype(config))
        plan.sizes[f"{what}_seconds"] = math.ceil(flops / speed)
