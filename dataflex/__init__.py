"""dataflex: LESS data selection inside LoRA fine-tuning. Each command is a function that takes a config."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Handed on lazily (PEP 562): importing dataflex, or asking the command line for help, imports no torch.
_HOMES = {
    "RunConfig": "dataflex.config",
    "load_config": "dataflex.config_file",
    "load_examples": "dataflex.data.examples",
    "warmup": "dataflex.training.runs",
    "train": "dataflex.training.runs",
    "grads": "dataflex.gradients.collect",
    "open_store": "dataflex.store.reader",
    "score": "dataflex.influence.scoring",
    "select": "dataflex.influence.selection",
    "merge": "dataflex.merging",
    "dynamic": "dataflex.dynamic_run",
    "bench": "dataflex.benchmark",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
