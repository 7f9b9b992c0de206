"""The base model, its tokenizer and a new adapter on it, from a hub id, a directory or a .gguf file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dataflex.adapters import put_on, read_adapter
from dataflex.config import RunConfig, needed
from dataflex.cost import out_of_memory
from dataflex.data.rows import largest_tokens
from dataflex.environment import local_rank
from dataflex.errors import UsageError, reason_of
from dataflex.folding import check_foldable, fold, without_copies
from dataflex.lora import has_transposed, lora_targets, peft_errors
from dataflex.model_files import check_base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def model_source(config: RunConfig, local_only: bool = False) -> dict[str, Any]:
    """The arguments with which transformers' `from_pretrained` finds the model, a .gguf file included.

    `local_only` never asks the hub: a hub id is then found only where it was downloaded before.
    """
    check_base_model(config)
    name = needed(config.model_name_or_path)
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if name.endswith(".gguf"):
        path = Path(name)
        return {**source, "pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    hub = {"revision": config.model_revision or "main", "local_files_only": local_only}
    return {**source, **hub, "pretrained_model_name_or_path": name}


def _not_loadable(config: RunConfig, what: str, error: Exception) -> UsageError:
    name = needed(config.model_name_or_path)
    way_out = "name a local folder, a .gguf file, or a hub id this machine can reach"
    if Path(name).exists():
        way_out = "put that right, or name another model"
    return UsageError(f"model_name_or_path: cannot load the {what} of {name}: {reason_of(error)}; {way_out}")


def load_tokenizer(config: RunConfig, local_only: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**model_source(config, local_only), padding_side="right")
    except UsageError:
        raise
    except Exception as error:  # of transformers and of tokenizers, whose class is Exception itself
        raise _not_loadable(config, "tokenizer", error) from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        found = f"in tokenizer_config.json model_max_length is {tokenizer.model_max_length!r}, not a number"
        raise _not_loadable(config, "tokenizer", ValueError(found))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: RunConfig, local_only: bool = False) -> PretrainedConfig:
    """The model's architecture, without its weights."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**model_source(config, local_only))
    except UsageError:
        raise
    except Exception as error:
        raise _not_loadable(config, "configuration", error) from error


def load_skeleton(config: RunConfig, local_only: bool = False) -> PreTrainedModel:
    """The model without numbers: its layers and their shapes."""
    from transformers import AutoModelForCausalLM

    architecture = load_model_config(config, local_only)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise _not_loadable(config, "configuration", error) from error


def compute_dtype(config: RunConfig) -> torch.dtype:
    """dtype of the base model's weights and matrix products."""
    if config.bf16 or config.pure_bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else torch.float32


def load_base_model(config: RunConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base model in `dtype` ("auto": as it is stored), on the CPU; on this process's device where quantized."""
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": dtype, **_quantization(config)}
    if config.flash_attn != "auto":
        how["attn_implementation"] = ATTENTION[config.flash_attn]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(**model_source(config), **how, output_loading_info=True)
    except UsageError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if "ignore_mismatched_sizes" in str(error):
            error = ValueError("the weights have other shapes than its config.json says")
        raise _not_loadable(config, "weights", error) from error
    model: PreTrainedModel = loaded[0]
    names = sorted(loaded[1]["missing_keys"])
    if names:  # transformers has put random numbers there
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise _not_loadable(config, "weights", ValueError(f"they have no {names[0]}{more}"))
    if config.model_name_or_path.endswith(".gguf"):
        _forget_quantization(model)
    model.config.use_cache = False
    return model


def _quantization(config: RunConfig) -> dict[str, Any]:
    """The arguments with which `from_pretrained` quantizes a model on loading, as LLaMA-Factory has them."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    if config.quantization_bit is None:
        return {}
    if config.model_name_or_path.endswith(".gguf"):
        raise UsageError("quantization_bit: a .gguf model is dequantized on loading; name the model it was made from")
    if is_deepspeed_zero3_enabled():
        raise UsageError("quantization_bit: ZeRO-3 shares out plain weights only; use ZeRO-2, or remove the key")
    if find_spec("bitsandbytes") is None:
        raise UsageError("quantization_bit needs bitsandbytes: pip install bitsandbytes, or remove the key")
    if config.quantization_bit == 8:
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=compute_dtype(config),
            bnb_4bit_quant_storage=compute_dtype(config),
            bnb_4bit_quant_type=config.quantization_type,
            bnb_4bit_use_double_quant=config.double_quantization,
        )
    return {"quantization_config": how, "device_map": {"": device()}}


def load_frozen_model(config: RunConfig) -> PreTrainedModel:
    """What training leaves as it is and its adapter sits on: the base in `compute_dtype`, and in it the adapters
    that are not trained on."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    model = load_base_model(config, compute_dtype(config))
    if config.folded_adapters and is_deepspeed_zero3_enabled():
        raise UsageError(
            "adapter_name_or_path: under ZeRO-3 no adapter can be folded in; merge it into the model first"
        )
    for path in config.folded_adapters:
        check_foldable(model, path)
    for adapter in [without_copies(model, read_adapter(path)) for path in config.folded_adapters]:
        model = fold(model, adapter)
    if config.upcast_layernorm:
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ln" in name):
                parameter.data = parameter.data.float()
    return model


def on_device(model: nn.Module) -> nn.Module:
    """`model` on this process's device; one that is quantized or shared out by ZeRO-3 is where it belongs."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    placed = is_deepspeed_zero3_enabled() or getattr(model, "is_quantized", False)
    return model if placed else model.to(device())


def _forget_quantization(model: PreTrainedModel) -> None:
    """A .gguf file is dequantized on loading; what says otherwise would bar training and saving."""
    for holder, names in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)


def add_lora(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """A fresh adapter on `model`: A random from `seed`, B zero, float32 unless `pure_bf16`."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    set_seed(config.seed)
    targets = lora_targets(model, config.lora_target)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,  # type: ignore[arg-type] # a float scales as well
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=targets,
        fan_in_fan_out=has_transposed(model, targets),
    )
    with peft_errors(model, targets):
        return get_peft_model(model, lora, autocast_adapter_dtype=not config.pure_bf16)


def load_adapter(model: PreTrainedModel, path: str | Path, config: RunConfig, trainable: bool = True) -> PeftModel:
    """The adapter in `path` on `model`; a UsageError where it was made for a model of other shapes."""
    return put_on(model, read_adapter(path), trainable=trainable, autocast_adapter_dtype=not config.pure_bf16)


def device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def check_vocabulary(model: nn.Module, examples: Sequence[Any], template: str | None) -> None:
    """Raise a UsageError if a row holds a token the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    largest = largest_tokens(examples)
    if len(largest) and largest.max() >= rows:
        example = examples[int(np.argmax(largest >= rows))]
        raise UsageError(
            f"row {example.row} of {example.dataset}: token {max(example.input_ids)}, but the model has {rows} "
            f"embeddings; template {template!r} does not fit this model"
        )
