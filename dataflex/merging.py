"""The `merge` command: adapters folded into their base model, saved as a model that plain transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dataflex.config import RunConfig, require
from dataflex.errors import DataflexError
from dataflex.files import check_output_dir
from dataflex.model import check_adapter_fits, device, load_adapter, load_base_model, load_model_config, load_tokenizer
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Generation settings that mean nothing without sampling, and transformers' neutral values."""


def merge(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Merge each of `adapter_name_or_path` in turn into the base model and save it in `export_dir`.

    The sum W + s·BA is taken in float32 and rounded once to the saved dtype: the base's own, with float32
    becoming bfloat16 as in LLaMA-Factory.

    Raises:
        UsageError: if an adapter does not fit the base; nothing is written.
        DataflexError: if merging changed nothing.
    """
    require(config, "merge", "model_name_or_path", "adapter_name_or_path", "export_dir")
    export_dir = check_output_dir(config.export_dir, "export_dir", config.overwrite)
    tokenizer = load_tokenizer(config)
    dtype = export_dtype(config)
    model: nn.Module = load_base_model(config, torch.float32)
    for adapter in config.adapter_name_or_path:
        check_adapter_fits(model, adapter)
    model.to(device() if config.export_device == "auto" else torch.device("cpu"))
    for adapter in config.adapter_name_or_path:
        model = _merged(model, adapter, config)
        progress.say(f"merged {adapter}")
    model.to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = True
    _consistent_generation(model)

    export_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=export_dir.parent, prefix=f".{export_dir.name}.") as temporary:
        folder = Path(temporary) / "model"
        _save(model, folder, config)
        tokenizer.padding_side = "left"  # for generation, as LLaMA-Factory exports it
        tokenizer.save_pretrained(folder)
        if export_dir.exists():
            shutil.rmtree(export_dir)
        folder.rename(export_dir)
    return export_dir


def export_dtype(config: RunConfig) -> torch.dtype:
    """The dtype the base model is stored in, half precision where that is float32."""
    dtype = load_model_config(config).dtype or torch.float32
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _merged(model: nn.Module, adapter: str, config: RunConfig) -> nn.Module:
    """`model` with one adapter folded in, after seeing that this changed every layer it should."""
    wrapped = load_adapter(model, adapter, config, trainable=False)
    layers = {name: module for name, module in wrapped.named_modules() if hasattr(module, "get_base_layer")}
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    merged = wrapped.merge_and_unload(safe_merge=True)
    unchanged = [name for name, base in bases.items() if torch.equal(base.weight, before[name])]
    if len(unchanged) == len(bases):
        raise DataflexError(f"adapter {adapter} changes nothing: every merged weight equals the base's; was it trained?")
    return merged


def _consistent_generation(model: PreTrainedModel) -> None:
    """Sampling values imply do_sample; transformers refuses to save them without it."""
    generation = model.generation_config
    if any(getattr(generation, key, None) not in (None, neutral) for key, neutral in SAMPLING.items()):
        generation.do_sample = True


def _save(model: PreTrainedModel, folder: Path, config: RunConfig) -> None:
    shard = f"{config.export_size}GB"
    model.save_pretrained(folder, max_shard_size=shard)
    if not config.export_legacy_format:
        return
    from huggingface_hub import save_torch_state_dict

    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_torch_state_dict(
        model.state_dict(),
        folder,
        filename_pattern="pytorch_model{suffix}.bin",
        max_shard_size=shard,
        safe_serialization=False,
        shared_tensors_to_discard=list(getattr(model, "_tied_weights_keys", None) or []),
    )
