"""Which modules carry a LoRA pair, what their tensors are called on disk, and in which order they flatten."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dataflex.errors import UsageError

OUTPUT_HEADS = {"chatglm": ("lm_head", "output_layer"), "internlm2": ("lm_head", "output"), "rwkv": ("head",)}
"""What the output head is called where it is not `lm_head` alone, by model type."""

PLAIN_LAYERS = (
    "Linear",
    "Linear8bitLt",
    "Linear4bit",
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "TorchaoLoraLinear",
)
"""PEFT's layers that compute y = Wx + scaling · B(Ax), whatever holds W."""

FEATURES = {
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable_token_indices",
    "lora_embedding": "an adapter on an embedding",
    "lora_magnitude_vector": "DoRA",
    ".bias": "bias",
}
"""Settings of PEFT that train more than pairs, by a part of the trained tensors' names."""

PLAIN_PAIRS_ONLY = (
    "gradients of single rows need plain LoRA pairs on linear layers, so train a new adapter with lora_target, "
    "or merge this one into the model first"
)


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
    """What `lora_target: all` looks at: the last name component of every linear layer but the output head.

    LLaMA-Factory's choice, and GPT-2's Conv1D layers, which are linear layers with a transposed weight. Where
    transformers holds a mixture's experts as one tensor, they are no linear layers.
    """
    heads = OUTPUT_HEADS.get(getattr(getattr(model, "config", None), "model_type", ""), ("lm_head",))
    names = {
        name.rpartition(".")[2]
        for name, module in text_modules(model)
        if _is_linear(module) and not any(head in name for head in heads)
    }
    return sorted(name for name in names if not name.isdigit())  # PEFT would match whole layers by a number


def _is_linear(module: nn.Module) -> bool:
    """True for every kind of linear layer: plain, quantized or transposed."""
    kind = type(module).__name__
    return ("Linear" in kind and "Embedding" not in kind) or kind == "Conv1D"


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

    `all` leaves out a mixture's fused experts, and the names that PEFT would take for them; a warning says so.

    Raises:
        UsageError: if a name matches no module, or one whose rows' gradients cannot be taken; if `all` finds no linear
            layer, or one that a state-space layer uses without calling it.
    """
    kind, linear = type(model).__name__, linear_names(model)
    bypassed = _bypassed_names(model)
    experts = _expert_names(model, linear if wanted == ["all"] else wanted)
    usable = [name for name in linear if name not in bypassed and name not in experts]
    way_out = f"linear layers are {', '.join(usable) or 'none'}"
    if wanted == ["all"]:
        if not usable:
            raise UsageError(f"lora_target: all finds no linear layer in {kind}; name modules by comma")
        if bypassed & set(linear):
            raise UsageError(
                f"lora_target: all does not fit {kind}, whose state-space layers use "
                f"{', '.join(sorted(bypassed & set(linear)))} without calling them; name modules, for instance "
                f"lora_target={','.join(usable)}"
            )
        _warn_of_experts(model, experts)
        targets = usable
    else:
        targets = wanted
        for target in targets:
            if target in experts:
                raise UsageError(
                    f"lora_target: PEFT takes {target} for the experts of a {model.config.model_type}, which are one "
                    f"tensor and not linear layers; {way_out}"
                )
    modules = text_modules(model)
    for target in targets:
        called = [module for name, module in modules if _is_called(name, target)]
        if not called:
            raise UsageError(f"lora_target: the model has no module {target!r}; {way_out}")
        others = {type(module).__name__ for module in called if not _is_linear(module)}
        if others:
            raise UsageError(f"lora_target: {target!r} is no linear layer but {', '.join(sorted(others))}; {way_out}")
        if target.rpartition(".")[2] in bypassed:
            raise UsageError(f"lora_target: a state-space layer uses {target} without calling it; {way_out}")
    if not has_other_senses(model):
        return targets
    # a short name would match in the other senses' towers as well
    return [name for name, _ in modules if any(_is_called(name, target) for target in targets)]


@contextlib.contextmanager
def peft_errors(model: nn.Module, targets: list[str]) -> Iterator[None]:
    """Turn what PEFT raises on adapting `targets` of `model` into a UsageError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"lora_target: PEFT cannot adapt {', '.join(targets)} of {type(model).__name__}: {reason.rstrip('.')}; "
            f"linear layers are {', '.join(linear_names(model))}"
        ) from error


def _warn_of_experts(model: nn.Module, taken: set[str]) -> None:
    """Say what `lora_target: all` does not adapt in a mixture of experts, if anything."""
    fused = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, weight in model.named_parameters()
        if _is_fused(name, weight)
    }
    reasons = []
    if fused:
        reasons.append(f"{', '.join(sorted(fused))}: all experts are one tensor, not linear layers")
    if taken:
        reasons.append(f"{', '.join(sorted(taken))}: PEFT takes these names for experts")
    if reasons:
        warnings.warn(f"lora_target: all leaves out {'; '.join(reasons)}", stacklevel=3)


def _is_fused(name: str, weight: torch.Tensor) -> bool:
    """True for a tensor [experts, in, out] of all experts' weights."""
    return weight.dim() == 3 and "experts" in name


def _bypassed_names(model: nn.Module) -> set[str]:
    """Names of linear layers whose weight a state-space layer's fast kernel reads, so that an adapter on them may have
    no part in a forward pass."""
    names = set()
    for _, module in text_modules(model):
        parts = dict(module.named_children())
        if hasattr(module, "A_log") and hasattr(module, "D") and "conv1d" in parts:
            names |= {"conv1d", "dt_proj", "out_proj", "x_proj"} & parts.keys()
    return names


def _expert_names(model: nn.Module, names: list[str]) -> set[str]:
    """Those of `names` that PEFT would not look up among the modules of `model`: it takes them for names that
    transformers 4 gave to a mixture's experts."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT without such a conversion
        return set()
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # of two fused tensors only one is named
            taken.add(name)
            continue
        if name not in config.target_modules:
            taken.add(name)
    return taken


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The LoRA pairs of `model`'s active adapter, in module order.

    Raises:
        UsageError: where the model has anything trainable beside plain LoRA pairs on linear layers.
    """
    from peft.tuners.lora import LoraLayer

    pairs = []
    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]
    for name, module in layers:
        for adapter in module.active_adapters:
            reason = _why_not_plain(module, adapter)
            if reason:
                raise UsageError(f"adapter at {name}: {reason}; {PLAIN_PAIRS_ONLY}")
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
    plain = {id(weight) for pair in pairs for weight in (pair.weight_a, pair.weight_b)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in plain:
            raise UsageError(f"adapter: {name} is trained and {_feature(name)}; {PLAIN_PAIRS_ONLY}")
    return pairs


def _why_not_plain(module: nn.Module, adapter: str) -> str | None:
    """What makes a LoRA layer something else than y = Wx + scaling · B(Ax); None where it is that."""
    if type(module).__name__ not in PLAIN_LAYERS or not _is_linear(module.get_base_layer()):
        on = type(module.get_base_layer()).__name__
        return f"{type(module).__name__} on {on} is no LoRA pair on a linear layer"
    if adapter not in module.lora_A:
        return "it has no LoRA pair"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or module.use_dora.get(adapter):
        return f"{type(variant).__name__.removesuffix('LinearVariant') or 'Dora'} is a variant of LoRA"
    if module.lora_bias.get(adapter):
        return "its B has a bias (lora_bias)"
    return None


def _feature(name: str) -> str:
    """What a trained tensor that is no A or B belongs to."""
    for part, feature in FEATURES.items():
        if part in name:
            return f"belongs to {feature}"
    return "is no A or B of a LoRA pair"


def has_transposed(model: nn.Module, targets: list[str]) -> bool:
    """True where `targets` of `model` hold their weight as [in, out], as GPT-2's Conv1D layers do."""
    return any(
        type(module).__name__ == "Conv1D" and any(_is_called(name, target) for target in targets)
        for name, module in model.named_modules()
    )


def layout(pairs: list[LoraPair]) -> list[Slot]:
    """The pairs' tensors, A before B, one after the other in a flat vector."""
    slots, offset = [], 0
    for pair in pairs:
        for letter, weight in (("A", pair.weight_a), ("B", pair.weight_b)):
            size = full_size(weight)
            slots.append(Slot(f"{pair.name}.lora_{letter}.weight", weight, offset, size))
            offset += size
    return slots


def pairs_of_layers(pairs: list[LoraPair], layers: str) -> list[LoraPair]:
    """The pairs of the decoder layers that `layers` names, as `15-29` or `15`; numbers count from 0, ends included.

    Raises:
        UsageError: for a layer that has no pair.
    """
    first, _, last = layers.partition("-")
    wanted = range(int(first), int(last or first) + 1)
    numbers = [_layer_of(pair.name) for pair in pairs]
    missing = sorted(set(wanted) - set(numbers))
    if missing or not wanted:
        there = sorted(number for number in set(numbers) if number is not None)
        raise UsageError(
            f"grad_layers {layers}: the adapter has no pair in layer {missing[0] if missing else first}; "
            f"it has pairs in {f'layers {there[0]} to {there[-1]}' if there else 'no numbered layer'}"
        )
    return [pair for pair, number in zip(pairs, numbers, strict=True) if number in wanted]


def _layer_of(name: str) -> int | None:
    """The number of the decoder layer that a module stands in: the first number in its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


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
