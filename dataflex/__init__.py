"""dataflex: LESS data selection inside LoRA fine-tuning. Each command is a function that takes a config."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Handed on lazily (PEP 562): importing dataflex, or asking the command line for help, imports no torch.
if TYPE_CHECKING:  # HOMES, for editors and type checkers
    from dataflex.benchmark import bench
    from dataflex.commands.console import Console
    from dataflex.comparison.run import compare
    from dataflex.config import RunConfig
    from dataflex.config_file import load_config
    from dataflex.data.examples import load_examples
    from dataflex.dynamic_run import dynamic
    from dataflex.evaluation.run import evaluate
    from dataflex.gradients.collect import grads
    from dataflex.influence.score_file import read_scores
    from dataflex.influence.scoring import score
    from dataflex.influence.selection import select
    from dataflex.inspection import inspect
    from dataflex.merging import merge
    from dataflex.reporting.run import report
    from dataflex.store.reader import open_store
    from dataflex.training.runs import train, warmup

    __version__: str

__all__ = [
    "Console",
    "RunConfig",
    "__version__",
    "bench",
    "compare",
    "dynamic",
    "evaluate",
    "grads",
    "inspect",
    "load_config",
    "load_examples",
    "merge",
    "open_store",
    "read_scores",
    "report",
    "score",
    "select",
    "train",
    "warmup",
]

# Each name and the module it is imported from when it is first asked for.
HOMES = {
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
    "evaluate": "dataflex.evaluation.run",
    "compare": "dataflex.comparison.run",
    "report": "dataflex.reporting.run",
    "bench": "dataflex.benchmark",
    "inspect": "dataflex.inspection",
    "read_scores": "dataflex.influence.score_file",
    "Console": "dataflex.commands.console",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dataflex.distribution import own_version

        return own_version()
    if name not in HOMES:
        raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
