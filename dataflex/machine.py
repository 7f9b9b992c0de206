"""The `env` command: what a report of a fault has to say of the machine."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex.distribution import namesake_notice
from dataflex.environment import world_size
from dataflex.provenance import device_name, versions

OPTIONAL = ("fast_jl", "bitsandbytes", "flash_attn", "sentence-transformers", "lm-eval", "tensorboard")
GIB = 1 << 30


def machine() -> dict[str, Any]:
    """Versions, devices, memory, disk, processes, and optional packages; null for one that is not installed."""
    import torch

    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / GIB, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "device": device_name(),
        "cores": cores,
        "memory_gib": round(memory / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": versions(),
        "optional": {name: _version_of(name) for name in OPTIONAL},
        "problems": [notice] if (notice := namesake_notice()) else [],
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
