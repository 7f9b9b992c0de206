"""Which modules carry a LoRA pair, what their tensors are called on disk, and in which order they flatten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dataflex.errors import UsageError

OUTPUT_HEADS = {"chatglm": ("lm_head", "output_layer"), "internlm2": ("lm_head", "output")}
"""What the output head is called where it is not `lm_head` alone, by model type."""


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
    """What `lora_target: all` means: the last name component of every linear layer but the output head.

    LLaMA-Factory's choice. Where transformers holds a mixture's experts as one tensor, they are no linear layers.
    """
    heads = OUTPUT_HEADS.get(getattr(getattr(model, "config", None), "model_type", None), ("lm_head",))
    names = {
        name.rpartition(".")[2]
        for name, module in text_modules(model)
        if "Linear" in type(module).__name__
        and "Embedding" not in type(module).__name__
        and not any(head in name for head in heads)
    }
    return sorted(names)


def has_other_senses(model: nn.Module) -> bool:
    """True for a model that also sees or hears: its language model is a part of it."""
    config = getattr(model, "config", None)
    return any(hasattr(config, f"{sense}_config") for sense in ("vision", "audio"))


def text_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, by name, that take part in reading text."""
    if not has_other_senses(model):
        return list(model.named_modules())
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [(f"{prefix}.{name}", module) for name, module in decoder.named_modules() if name]


def lora_targets(model: nn.Module, wanted: list[str]) -> list[str]:
    """Names of the modules that get a pair when `lora_target` is `wanted`, as PEFT takes them.

    Raises:
        UsageError: if a name matches no module, or `all` finds none.
    """
    linear = linear_names(model)
    if wanted == ["all"] and not linear:
        raise UsageError(f"lora_target: all finds no linear layer in {type(model).__name__}; name modules by comma")
    targets = linear if wanted == ["all"] else wanted
    modules = text_modules(model)
    for target in targets:
        if not any(_is_called(name, target) for name, _ in modules):
            raise UsageError(f"lora_target: the model has no module {target!r}; linear layers are {', '.join(linear)}")
    if not has_other_senses(model):
        return targets
    # a short name would match in the other senses' towers as well
    return [name for name, _ in modules if any(_is_called(name, target) for target in targets)]


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


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
