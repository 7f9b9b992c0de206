"""The files of a base model, found without torch; model.py loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dataflex.config import RunConfig, needed, require
from dataflex.errors import UsageError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of which transformers reads the first that is there. An index names the files that hold the weights."""

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` is nothing on this disk and has the form of a model's name on the hub."""
    return not Path(name).exists() and not name.endswith(".gguf") and HUB_ID.fullmatch(name) is not None


def check_base_model(config: RunConfig) -> None:
    """Raise a UsageError unless model_name_or_path is a model's folder, a .gguf file, or may be one of the hub."""
    require(config, "loading a model", "model_name_or_path")
    name = needed(config.model_name_or_path)
    path = Path(name)
    if name.endswith(".gguf") and not path.is_file():
        raise UsageError(f"model_name_or_path: no file {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"model_name_or_path: {name} has no config.json; name a folder that holds a whole model")
    if path.is_file() and not name.endswith(".gguf"):
        raise UsageError(
            f"model_name_or_path: {name} is a file; name a folder that holds a whole model, or a .gguf file"
        )
    if not path.exists() and not is_hub_id(name):
        raise UsageError(f"model_name_or_path: no folder {name}; name a local folder, a .gguf file, or a hub id")


def check_weights(config: RunConfig) -> None:
    """Raise a UsageError unless the weights of a local model are there and none of their files is cut off."""
    from safetensors import SafetensorError, safe_open

    check_base_model(config)
    folder = Path(needed(config.model_name_or_path))
    if not folder.is_dir():
        return
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"model_name_or_path: {folder} has no weights; name a folder that holds a whole model")
    for path in sorted(folder / name for name in _files_of(found)) if found.suffix == ".json" else [found]:
        if not path.is_file():
            raise UsageError(f"model_name_or_path: {folder} lacks {path.name}, which its index names; copy it there")
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError):
            raise UsageError(
                f"model_name_or_path: {path} is not a whole safetensors file; copy it again from where it was made"
            ) from None


def _files_of(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"model_name_or_path: {index} is not an index of weights; copy it again from where it was made"
        ) from None
