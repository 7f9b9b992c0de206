"""LoRA adapters: read as they lie on disk, and put on a base model.

PEFT places and computes every kind of adapter. Added here: names and files as other trainers leave them, each refusal
as one sentence, vocabularies of another size.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.adapter_files import CONFIG_FILE, WEIGHT_FILES, adapter_folder, weights_file
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base model."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory."""

    path: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    """By the names under which PEFT writes them."""


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in `path`, its names and its configuration as PEFT writes them.

    Raises:
        UsageError: if a file is missing or damaged, a tensor is empty or not finite, or PEFT cannot read the
            configuration.
    """
    folder = adapter_folder(path)
    return Adapter(str(path), _read_config(folder), _read_tensors(folder))


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    what = f"adapter {folder}: {CONFIG_FILE}"
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{what} is not JSON; copy the adapter again from where it was made") from None
    if not isinstance(values, dict) or "peft_type" not in values:
        raise UsageError(f"{what} does not say its peft_type; copy the adapter again from where it was made")
    if values["peft_type"] != "LORA":
        raise UsageError(
            f"{what} says peft_type {values['peft_type']}, and LORA is the one that is read here; "
            "merge it with PEFT where it was made and name the result as model_name_or_path"
        )
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise UsageError(
            f"{what} says task_type {values['task_type']}, and CAUSAL_LM is the one that is read here; "
            "name an adapter of a language model"
        )
    if not isinstance(values.get("base_model_name_or_path"), str | None):
        raise UsageError(
            f"{what}: base_model_name_or_path must be a text; copy the adapter again from where it was made"
        )
    values.pop("runtime_config", None)  # how to run, not what the adapter is
    unknown = {key: values.pop(key) for key in list(values) if key not in LoraConfig.__dataclass_fields__}
    told = [key for key, value in unknown.items() if value not in (None, False, "", [], {})]
    if told:
        raise UsageError(
            f"{what} sets {', '.join(told)}, which PEFT {version('peft')} does not know; "
            "install a newer peft, or remove the key if the adapter does not need it"
        )
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        named = values.get(key)
        if not isinstance(named, str | list | None) or not all(isinstance(name, str) for name in named or []):
            raise UsageError(f"{what}: {key} must be names of modules; copy the adapter again from where it was made")
        if isinstance(named, list):
            values[key] = [_bare(name) for name in named]
    if not _is_count(values.get("r", 8)) or not isinstance(values.get("lora_alpha", 8), int | float):
        raise UsageError(f"{what}: r must be a whole number above 0 and lora_alpha a number; copy the adapter again")
    try:
        return LoraConfig(**{**values, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UsageError(
            f"{what} holds values that PEFT {version('peft')} does not take; copy the adapter again, "
            "or save it with this version of PEFT"
        ) from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = weights_file(folder)
    what = f"adapter {folder}: {file.name}"
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UsageError(
            f"{what} holds more than tensors, and code from disk is not run; save it as {WEIGHT_FILES[0]} "
            "where it was made"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError):
        kind = "safetensors" if file.suffix == ".safetensors" else "torch"
        raise UsageError(f"{what} is not a whole {kind} file; copy it again from where it was made") from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UsageError(f"{what} is not a table of named tensors; save the adapter with PEFT's save_pretrained")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in found.items():
        if ".original_module." in key:
            continue  # the base's, in whose place one of modules_to_save stands
        name = plain_name(key)
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise UsageError(f"{what} holds two adapters, for {key} is there twice; save one of them by itself")
        if not tensor.numel() or (re.search(r"\.lora_[AB]\.weight$", name) and tensor.ndim < 2):
            raise UsageError(
                f"{what} holds {key} of shape {list(tensor.shape)}, a part of a tensor, as ZeRO-3 or FSDP leave it; "
                "gather the weights where they were trained (DeepSpeed's zero_to_fp32.py does) and save them again"
            )
        if not torch.isfinite(tensor).all():
            raise UsageError(f"adapter {folder} at {name}: not all of its numbers are finite; train it again")
        tensors[name] = tensor
    return tensors


def plain_name(key: str) -> str:
    """A tensor's name as PEFT writes it to disk, from one that wrappers and a live model's adapter name lengthened."""
    name = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", "", key).lstrip(".")
    name = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", _bare(name))
    name = re.sub(r"(\.(?:lora|trainable_tokens)_\w+)\.default(?=\.|$)", r"\1", name)
    return PREFIX + re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def _bare(name: str) -> str:
    """A module's name in the base model, whatever wrapped that."""
    return re.sub(rf"^(?:module\.|{re.escape(PREFIX)})+", "", name)


def _misfit(adapter: Adapter, why: str) -> UsageError:
    base = adapter.config.base_model_name_or_path
    known = f", which {CONFIG_FILE} calls {base}" if base else ""
    return UsageError(
        f"adapter {adapter.path} does not fit the base model: {why}; name the base it was trained on{known}"
    )


def put_on(
    model: PreTrainedModel, adapter: Adapter, *, trainable: bool = False, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """PEFT's model of `adapter` on `model`, each tensor in its place; the vocabulary is resized to the adapter's.

    Raises:
        UsageError: if the adapter was made for a model of other layers or shapes.
    """
    from peft import PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict

    fit_vocabulary(model, adapter)
    config = deepcopy(adapter.config)
    config.inference_mode = not trainable
    if model.device.type == "meta":
        config.init_lora_weights = True  # other ways to begin need the base's numbers
    try:
        wrapped = PeftModelForCausalLM(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError) as error:
        targets = config.target_modules or config.target_parameters or config.modules_to_save
        named = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
        why = f"PEFT cannot adapt {named} of a {type(model).__name__}"
        raise _misfit(adapter, why) from error
    try:
        result: Any = set_peft_model_state_dict(wrapped, adapter.tensors)
    except KeyError as error:
        raise _misfit(adapter, f"it lacks {error.args[0]}, which its configuration names") from error
    except (RuntimeError, ValueError) as error:
        sizes = re.findall(r"size mismatch for (\S+): .*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", str(error), re.DOTALL)
        why = "its tensors are of other shapes"
        if sizes:
            key, found, needed = min(sizes)
            why = f"{plain_name(key)} is {found}, but the model needs {needed}"
        raise _misfit(adapter, why) from error
    strange = [name for key in result.unexpected_keys if not _is_tied_copy(name := plain_name(key), adapter)]
    if strange:
        raise _misfit(adapter, f"it adapts {strange[0].removeprefix(PREFIX)}, which the model lacks")
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = [name for key in result.missing_keys if (name := plain_name(key)) in expected]
    if missing:
        raise _misfit(adapter, f"it lacks {missing[0]}, which its configuration names")
    if not trainable:
        wrapped.eval()
    return wrapped


def _is_tied_copy(name: str, adapter: Adapter) -> bool:
    """Whether the tensor `name` repeats the rows that the embedding, which the head is tied to, was trained with."""
    kind = ".token_adapter.trainable_tokens_delta"
    return name.endswith(kind) and any(
        other != name and other.endswith(kind) and torch.equal(tensor, adapter.tensors[name])
        for other, tensor in adapter.tensors.items()
    )


def base_name(name: str) -> str:
    """What a tensor's name is in the base model, where it names a tensor of that."""
    return re.sub(r"(\.token_adapter)?\.base_layer(?=\.)", "", name.removeprefix(PREFIX))


def ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head, as far as the model has one weight for each."""
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):
            found.append(None)
    return found[0], found[1]


def fit_vocabulary(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give `model` as many embeddings as `adapter` was trained with, where it brings the rows that are new."""
    embedding, head = ends(model)
    if embedding is None:
        return
    rows = embedding.weight.shape[0]
    names = {name: module for name, module in model.named_modules() if module is embedding or module is head}
    wanted, brought = rows, []
    for name, module in names.items():
        whole = [key for key in adapter.tensors if base_name(key) == f"{name}.weight"]
        axes = {**dict.fromkeys(whole, 0), f"{PREFIX}{name}.lora_embedding_A": 1, f"{PREFIX}{name}.lora_B.weight": 0}
        sizes = [adapter.tensors[key].shape[axis] for key, axis in axes.items() if key in adapter.tensors]
        wanted = next((size for size in sizes if size != rows), wanted)
        brought += [module] if whole else []
    trained = adapter.config.trainable_token_indices or []
    by_module = trained if isinstance(trained, dict) else {"": trained}
    beyond = {index for indices in by_module.values() for index in indices if index >= rows}
    if wanted == rows and beyond:
        wanted = max(beyond) + 1
        if len(beyond) == wanted - rows:  # each new row is one that was trained
            brought += [
                module
                for name, module in names.items()
                if any(name.endswith(key) for key in by_module if key) or (module is embedding and "" in by_module)
            ]
    if wanted == rows:
        return
    shared = head is not None and head.weight is embedding.weight
    needed = [end for end in (embedding, head) if end is not None]
    if not (brought if shared else all(any(end is module for module in brought) for end in needed)):
        raise _misfit(
            adapter,
            f"it was trained with {wanted} embeddings, the model has {rows}, and it does not hold what the others are; "
            "resize the base as for training and save it first",
        )
    model.resize_token_embeddings(int(wanted), mean_resizing=False)
