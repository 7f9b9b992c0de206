"""The files of a LoRA adapter, found without torch; adapters.py reads them."""

from __future__ import annotations

from pathlib import Path

from dataflex.errors import UsageError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_folder(path: str | Path) -> Path:
    """`path`, after checking that an adapter lies there."""
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"adapter {path}: no {CONFIG_FILE}; name a folder that warmup, train or dynamic wrote")
    weights_file(folder)
    return folder


def weights_file(folder: str | Path) -> Path:
    """The file with an adapter's tensors; safetensors where there are both."""
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UsageError(
        f"adapter {folder}: no {' and no '.join(WEIGHT_FILES)}; name a folder that warmup, train or dynamic wrote"
    )
