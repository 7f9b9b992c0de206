"""Which modules carry a LoRA pair, what their tensors are called on disk, and in which order they flatten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dataflex.errors import UsageError


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear layer: y = Wx + scaling · B(Ax)."""

    name: str
    """Module path as adapter_model.safetensors has it."""
    module: nn.Module
    """PEFT's layer, holding the frozen base layer and the pair."""
    weight_a: nn.Parameter
    """[r, in]"""
    weight_b: nn.Parameter
    """[out, r]"""
    scaling: float


@dataclass(frozen=True)
class Slot:
    """Where one LoRA tensor lies in the flattened parameter vector."""

    name: str
    """Its key in adapter_model.safetensors."""
    parameter: nn.Parameter
    offset: int
    size: int


def linear_names(model: nn.Module) -> list[str]:
    """What `lora_target: all` means: the last name component of every linear layer but the output head."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__
        and "lm_head" not in name
        and not name.startswith(("score", "output_layer"))
    }
    return sorted(names)


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The LoRA pairs of `model`'s active adapter, in module order.

    Raises:
        UsageError: where trainable adapter weights are not plain LoRA pairs on linear layers.
    """
    from peft.tuners.lora import LoraLayer

    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter not in module.lora_A:
                raise UsageError(f"adapter at {name}: not a LoRA pair on a linear layer; per-row gradients need that")
            if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                raise UsageError(f"adapter at {name}: DoRA or a LoRA bias; per-row gradients need plain LoRA pairs")
            pairs.append(
                LoraPair(
                    name=name,
                    module=module,
                    weight_a=module.lora_A[adapter].weight,
                    weight_b=module.lora_B[adapter].weight,
                    scaling=module.scaling[adapter],
                )
            )
    if not pairs:
        raise UsageError("the model has no LoRA adapter")
    if len({pair.name for pair in pairs}) < len(pairs):
        raise UsageError("several adapters are active at once; merge all but one first")
    return pairs


def layout(pairs: list[LoraPair]) -> list[Slot]:
    """The pairs' tensors, A before B, one after the other in a flat vector."""
    slots, offset = [], 0
    for pair in pairs:
        for letter, weight in (("A", pair.weight_a), ("B", pair.weight_b)):
            size = full_size(weight)
            slots.append(Slot(f"{pair.name}.lora_{letter}.weight", weight, offset, size))
            offset += size
    return slots


def full_value(weight: torch.Tensor) -> torch.Tensor:
    """A parameter's value as float32, gathered from all processes where ZeRO-3 has shared it out. Collective there."""
    if not hasattr(weight, "ds_id"):
        return weight.detach().float()
    from deepspeed import zero

    with zero.GatheredParameters([weight]):
        return weight.detach().float().clone()


def full_size(weight: torch.Tensor) -> int:
    """Elements of a parameter, also where ZeRO-3 left this process only its share."""
    return getattr(weight, "ds_numel", weight.numel())
