"""The `merge` command: adapters folded into their base model, saved as a model that plain transformers loads.

What is written equals `llamafactory-cli export`, save that each sum W + s·BA is taken in float32, and that
`generation_config.json` also names the end token that `template` trained the model to stop at.
"""

from __future__ import annotations

import json
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataflex.config import RunConfig, require
from dataflex.data.chat_formats import REPLACING, jinja_template, ollama_modelfile, read_template
from dataflex.data.templates import find_template, prepare_tokenizer
from dataflex.errors import UsageError
from dataflex.files import check_output_dir, write_json, write_text
from dataflex.model import check_adapter_fits, device, fold, load_base_model, load_tokenizer
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLING = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 0, 50),
    "typical_p": (None, 1.0),
    "min_p": (None,),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
"""Generation settings that mean nothing without sampling, and the values at which they say nothing."""

EXPORTED = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model*.bin.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "spiece.model", "*.py", "Modelfile",
)  # fmt: skip
"""The files an export may consist of: only a folder of nothing else is ever replaced."""


def merge(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Merge each of `adapter_name_or_path` in turn into the base model and save it in `export_dir`.

    Raises:
        UsageError: if an adapter does not fit the base, or `export_dir` holds anything but an earlier export;
            nothing is written.
        DataflexError: if merging changed nothing.
    """
    require(config, "merge")
    export_dir = check_export_dir(config)
    tokenizer = load_tokenizer(config)
    chat = _prepare_chat(tokenizer, config.template)
    model = load_base_model(config, "auto")
    for adapter in config.adapter_name_or_path:
        check_adapter_fits(model, adapter)
    model.to(device() if config.export_device == "auto" else torch.device("cpu"))
    for adapter in config.adapter_name_or_path:
        model = fold(model, adapter, config)
        progress.say(f"merged {adapter}")
    model.to(export_dtype(model.dtype))
    model.config.dtype = model.dtype
    model.config.use_cache = True
    _fix_generation(model, tokenizer)

    export_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=export_dir.parent, prefix=f".{export_dir.name}.") as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder, max_shard_size=f"{config.export_size}GB")
        if config.export_legacy_format:
            _to_legacy(folder)
        tokenizer.padding_side = "left"  # for generation
        tokenizer.save_pretrained(folder)
        write_text(folder / "Modelfile", ollama_modelfile(chat, tokenizer))
        if export_dir.exists():
            export_dir.rename(Path(temporary) / "former")
        folder.rename(export_dir)
    return Path(config.export_dir)


def check_export_dir(config: RunConfig) -> Path:
    """The folder to write, links followed; a UsageError where writing it would cost something else."""
    export_dir = check_output_dir(config.export_dir, "export_dir", config.overwrite).resolve()
    for key, paths in (
        ("model_name_or_path", [config.model_name_or_path]),
        ("adapter_name_or_path", config.adapter_name_or_path),
    ):
        for path in paths:
            if Path(path).exists() and Path(path).resolve().is_relative_to(export_dir):
                raise UsageError(f"export_dir {config.export_dir}: {key} {path} lies there; choose another export_dir")
    if export_dir.is_dir():
        strange = [
            path.name
            for path in sorted(export_dir.iterdir())
            if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in EXPORTED)
        ]
        if strange:
            raise UsageError(
                f"export_dir {config.export_dir} holds {strange[0]}, which is no part of an earlier export and "
                "would be lost; choose another export_dir, or empty it by hand"
            )
    return export_dir


def export_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype a model stored as `stored` is saved in: the same, but float32 is halved where a GPU is there.

    LLaMA-Factory's rule: bfloat16 on a GPU that knows it, float16 on an older one, and float32 stays without a
    GPU, on which half precision would gain nothing. So equal machines write equal files; to have another dtype,
    load the result with `dtype=` and save it.
    """
    if stored != torch.float32 or not torch.cuda.is_available():
        return stored
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _prepare_chat(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Any:
    """Give the tokenizer the special tokens and the wording of `template`; returns that template."""
    template = find_template(name) if name is not None else None
    prepare_tokenizer(tokenizer, template)
    if template is None:
        return read_template(tokenizer) if tokenizer.chat_template else None
    if not tokenizer.chat_template or name in REPLACING:
        tokenizer.chat_template = jinja_template(template, tokenizer)
    return template


def _fix_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sampling values imply do_sample, without which transformers refuses to save them; and generation stops at
    the token that ends a turn, which a template may have changed."""
    generation = model.generation_config
    if any(getattr(generation, key, None) not in neutral for key, neutral in SAMPLING.items()):
        generation.do_sample = True
    ends = generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id not in ends:
        generation.eos_token_id = [*ends, tokenizer.eos_token_id]


def _to_legacy(folder: Path) -> None:
    """The same shards as pytorch_model*.bin, one after the other."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / _legacy_name(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: _legacy_name(file) for name, file in content["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", content)
        index.unlink()


def _legacy_name(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
