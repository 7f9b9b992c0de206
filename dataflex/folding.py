"""Adapters folded into their base model.

PEFT merges every kind of adapter. Added here: sums in float32, tied embeddings, several adapters in sequence, each
refusal as one sentence.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.adapters import PREFIX, Adapter, base_name, ends, put_on, read_adapter
from dataflex.errors import DataflexError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

UNMERGEABLE = {
    "alora_invocation_tokens": "an activated LoRA changes only what follows its invocation tokens",
    "arrow_config": "a router picks among several adapters for each token",
    "layer_replication": "its layers share the weights of other layers",
    "use_qalora": "its sums need the quantized base",
}
"""Keys of adapter_config.json that no merged model can express, and why."""


def fold(
    model: PreTrainedModel, adapter: Adapter, look: Callable[[PeftModel, Adapter], None] | None = None
) -> PreTrainedModel:
    """`model` with one adapter folded in, each layer's sum taken in float32 and rounded to the layer's dtype.

    Layer by layer, so that no more than one of them is held in float32 beside the model.

    Args:
        look: is shown base + adapter, and the adapter, before anything is merged.

    Raises:
        UsageError: if the adapter does not fit the model, cannot be merged, or the model is quantized.
        DataflexError: if no weight changed, or one is no longer finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if getattr(model, "is_quantized", False):
        raise UsageError(f"adapter {adapter.path}: the base model is quantized; name the model it was quantized from")
    check_kind(adapter)
    changed = any(not _same(parameter, adapter.tensors[name]) for name, parameter in _base_tensors(model, adapter))
    wrapped = put_on(model, adapter)
    if look is not None:
        look(wrapped, adapter)
    _make_ready(wrapped, adapter)
    for name, layer in wrapped.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            layer.modules_to_save.to(next(layer.original_module.parameters()).dtype)
        if isinstance(layer, BaseTunerLayer):
            changed = _merge_layer(layer, f"adapter {adapter.path} at {name.removeprefix(PREFIX)}") or changed
    if not changed:
        raise DataflexError(
            f"adapter {adapter.path} changes nothing: every merged weight equals the base's; was it trained?"
        )
    merged = wrapped.unload()
    _settle_tie(merged)
    return merged


def check_kind(adapter: Adapter) -> None:
    """Raise a UsageError where the adapter is of a kind that no merged model can express."""
    for key, why in UNMERGEABLE.items():
        if getattr(adapter.config, key, None):
            raise UsageError(f"adapter {adapter.path} cannot be merged: {key} is set, and {why}; serve it with PEFT")


def check_foldable(model: PreTrainedModel, path: str | Path) -> None:
    """Raise a UsageError unless the adapter in `path` can be folded into a model like `model`, which stays as it is
    and may be one without numbers."""
    adapter = read_adapter(path)
    check_kind(adapter)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch warns that a tensor without numbers takes none
        _make_ready(put_on(type(model)(deepcopy(model.config)), adapter), adapter)


def _merge_layer(layer: Any, what: str) -> bool:
    """Merge one of PEFT's layers into its base layer in float32; whether that changed it."""
    base = layer.get_base_layer()
    before = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    for parameter in base.parameters(recurse=False):
        parameter.data = parameter.data.float()
    try:
        layer.merge(safe_merge=True)
    except ValueError:
        raise DataflexError(f"{what}: the merged weights are not all finite; train it again") from None
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(f"{what}: PEFT cannot merge this kind of layer; serve the adapter with PEFT") from error
    changed = False
    for name, value in before.items():
        parameter = getattr(base, name)
        parameter.data = parameter.data.to(value.dtype)
        if not torch.isfinite(parameter.data).all():
            raise DataflexError(f"{what}: the merged weights are not all finite in {value.dtype}; train it again")
        changed = changed or not torch.equal(parameter.data, value)
    return changed


def _make_ready(wrapped: PeftModel, adapter: Adapter) -> None:
    """Untie what the adapter tells apart, and refuse what a merged model cannot hold."""
    _check_biases(wrapped, adapter)
    _untie(wrapped)
    _check_unshared(wrapped, adapter)


def _check_biases(wrapped: PeftModel, adapter: Adapter) -> None:
    from peft.tuners.lora import LoraLayer

    for name, layer in wrapped.named_modules():
        if not isinstance(layer, LoraLayer) or not any(layer.lora_bias.values()):
            continue
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise UsageError(
                f"adapter {adapter.path} at {name.removeprefix(PREFIX)}: it adds a bias (lora_bias) where the base has "
                "none, which a merged model cannot hold; serve it with PEFT"
            )


def _staying(module: Any) -> Any:
    """What a module that PEFT wrapped is once the adapter is unloaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return _staying(module.modules_to_save["default"])
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _untie(wrapped: PeftModel) -> None:
    """Give the output head a weight of its own where an adapter sits on it or on the embedding it shares with: a sum
    into the one would change the other as well."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    embedding, head = ends(wrapped.get_base_model())
    if not any(isinstance(end, BaseTunerLayer | TrainableTokensWrapper) for end in (embedding, head)):
        return
    if head is not None and _staying(head).weight is _staying(embedding).weight:
        weight = _staying(head).weight
        _staying(head).weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _settle_tie(model: PreTrainedModel) -> None:
    """Tie the output head to the embedding where both came out equal; let the configuration say what is so."""
    ends_of_model: tuple[Any, Any] = ends(model)
    embedding, head = ends_of_model
    said = getattr(model.config, "tie_word_embeddings", None)
    if said is None or getattr(head, "weight", None) is None:
        return
    if said and head.weight is not embedding.weight and _same(head.weight, embedding.weight):
        head.weight = embedding.weight
    tied = head.weight is embedding.weight
    if tied != said:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = tied
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _check_unshared(wrapped: PeftModel, adapter: Adapter) -> None:
    """Refuse sums into a weight that other layers share: they would change there too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(
        id(parameter)
        for name, module in wrapped.named_modules()
        if not name.endswith(".original_module")  # replaced when the adapter is unloaded
        for parameter in module.parameters(recurse=False)
    )
    for name, layer in wrapped.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if any(owners[id(parameter)] > 1 for parameter in layer.get_base_layer().parameters(recurse=False)):
            raise UsageError(
                f"adapter {adapter.path} at {name.removeprefix(PREFIX)}: other layers share this weight, and a merged "
                "model would change them too; serve the adapter with PEFT"
            )


def _base_tensors(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's tensors that take the place of a parameter of `model`: their names, and that parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in adapter.tensors:
        parameter = parameters.get(base_name(name))
        if parameter is not None:
            yield name, parameter


def _same(parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    return parameter.shape == tensor.shape and torch.equal(parameter.data, tensor.to(parameter))


def without_copies(model: nn.Module, adapter: Adapter) -> Adapter:
    """`adapter` without the weights that PEFT saves beside a pair on the embedding or the output head and that are
    `model`'s own: loaded after another adapter, they would undo it."""
    saved = adapter.config.modules_to_save or []
    copies = {
        name
        for name, parameter in _base_tensors(model, adapter)
        if name.endswith(".weight")
        and not any(part in saved for part in _endings(name))
        and not parameter.is_meta
        and _same(parameter, adapter.tensors[name])
    }
    return replace(adapter, tensors={name: value for name, value in adapter.tensors.items() if name not in copies})


def _endings(name: str) -> Iterator[str]:
    """The names by which a configuration may mean the module of a tensor: a.b.c and b.c and c."""
    parts = name.removeprefix(PREFIX).split(".")[:-1]
    return (".".join(parts[start:]) for start in range(len(parts)))
