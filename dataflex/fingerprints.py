"""Fingerprints of base models and adapters: sha256 over what decides their numbers.

The bytes of large files are read once. Their hash is kept beside the encoded rows, under the file's path, size,
modification time and inode; a file that was changed less than two seconds before it was read is not kept, since a
later change could bear the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.adapter_files import adapter_folder, weights_file
from dataflex.config import RunConfig, needed
from dataflex.errors import DataflexError, UsageError
from dataflex.files import write_json
from dataflex.masking import masked
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from dataflex.lora import LoraPair

CHUNK_BYTES = 1 << 24
SETTLED_SECONDS = 2.0
# Facts of adapter_config.json that no number depends on.
IDLE_SETTINGS = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "auto_mapping")


def base_model_fingerprint(
    config: RunConfig, progress: Progress = SILENT, keep: bool = True
) -> tuple[str, dict[str, Any]]:
    """sha256 (hex) over the frozen base, the adapters folded into it included, and the hash of each of its parts.

    A local folder or .gguf file is told by its bytes, a model of the hub by its commit. `keep` False adds no hash to
    the cache.
    """
    facts = {"model_name_or_path": masked(config.model_name_or_path), **_base_parts(config, progress, keep)}
    for adapter in config.folded_adapters:
        facts[f"adapter {adapter}"] = adapter_fingerprint(adapter, keep)
    parts = [value for name, value in facts.items() if name != "model_name_or_path"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest(), facts


def _base_parts(config: RunConfig, progress: Progress, keep: bool) -> dict[str, str]:
    from dataflex.model import load_model_config

    if config.model_name_or_path is None:
        raise UsageError("model_name_or_path is not set")
    path = Path(needed(config.model_name_or_path))
    if not path.exists():
        commit = getattr(load_model_config(config), "_commit_hash", None)
        return {"commit": commit or config.model_name_or_path}
    files = [path] if path.is_file() else model_files(path)
    return {file.name: digest for file, digest in zip(files, file_hashes(files, progress, keep), strict=True)}


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that decide its numbers: weights, config.json, and code of its own."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in weights:
        if not path.is_file():
            raise UsageError(f"model {folder}: {path.name} is no file; put the weights there, or name another model")
    return [*weights, folder / "config.json", *sorted(folder.glob("*.py"))]


def adapter_fingerprint(path: str | Path, keep: bool = True) -> str:
    """sha256 (hex) over an adapter's weights and the settings that say how they act."""
    folder = adapter_folder(path)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        acting = {
            name: sorted(value, key=str) if isinstance(value, list) else value
            for name, value in settings.items()
            if name not in IDLE_SETTINGS
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"adapter {path}: adapter_config.json is not readable ({error})") from None
    [weights] = file_hashes([weights_file(folder)], keep=keep)
    return hashlib.sha256(f"{weights}{json.dumps(acting, sort_keys=True)}".encode()).hexdigest()


def live_adapter_fingerprint(pairs: Iterable[LoraPair]) -> str:
    """sha256 (hex) over the names, values and scalings of a model's LoRA pairs. Collective under ZeRO-3."""
    from dataflex.lora import full_value

    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.name} {pair.scaling!r}".encode())
        for weight in (pair.weight_a, pair.weight_b):
            digest.update(full_value(weight).contiguous().cpu().numpy().data)
    return digest.hexdigest()


def file_hashes(paths: Iterable[Path], progress: Progress = SILENT, keep: bool = True) -> list[str]:
    """sha256 (hex) of each file's bytes, read only where no hash of this very file is kept."""
    known = [(path, _kept_hash(path)) for path in paths]
    size = sum(path.stat().st_size for path, digest in known if digest is None)
    if not size:
        return [digest for _, digest in known if digest is not None]
    with progress.task("reading weights", -(-size // CHUNK_BYTES), "chunks") as task:
        return [digest or _read_hash(path, task.advance, keep) for path, digest in known]


def _read_hash(path: Path, advance: Any, keep: bool) -> str:
    before, digest = path.stat(), hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
            advance()
    if keep and time.time() - before.st_mtime > SETTLED_SECONDS and _identity(before) == _identity(path.stat()):
        with contextlib.suppress(OSError, DataflexError):  # a cache that cannot be written is no fault of the run
            write_json(_cache_path(path), {**_identity(before), "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _kept_hash(path: Path) -> str | None:
    try:
        kept = json.loads(_cache_path(path).read_text(encoding="utf-8"))
        digest = kept.pop("sha256")
        return digest if kept == _identity(path.stat()) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _identity(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino, "device": status.st_dev}


def _cache_path(path: Path) -> Path:
    from dataflex.data.row_cache import cache_dir

    return cache_dir() / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}.json"
