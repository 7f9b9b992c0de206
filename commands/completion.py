"""What a shell is offered to complete a word with. Nothing here imports torch, or fails."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path


def keys(incomplete: str) -> list[str]:
    """YAML files of the folder, and keys with their `=`."""
    from dataflex.config import MARKS

    if "=" in incomplete:
        key, _, value = incomplete.partition("=")
        return [f"{key}={choice}" for choice in values(key)(value)]
    folder = Path(incomplete).parent if incomplete.count("/") else Path()
    files = [str(path) + ("/" if path.is_dir() else "") for path in _entries(folder)]
    found = [name for name in files if name.endswith((".yaml", ".yml", "/"))]
    return _beginning(incomplete, [*found, *(f"{key}=" for key in MARKS if key != "training_arguments")])


def values(key: str) -> Callable[[str], list[str]]:
    """A function from the beginning of a value of `key` to the values that it may have, where they are known."""

    def complete(incomplete: str) -> list[str]:
        if key in ("dataset", "eval_dataset", "held_out", "data"):
            before, comma, last = incomplete.rpartition(",")
            return [f"{before}{comma}{name}" for name in _beginning(last, _datasets())]
        return _beginning(incomplete, _known(key))

    return complete


def choices(key: str) -> tuple[str, ...]:
    """The values that a key may have, where they are few enough to be listed."""
    from dataflex.config import choices_of
    from dataflex.projection.table import PROJECTORS
    from dataflex.selectors.table import packaged_components

    if key == "projector":
        return tuple(PROJECTORS)
    if key in ("component_name", "selectors"):
        return tuple(packaged_components())
    return choices_of(key)


def _known(key: str) -> Iterable[str]:
    from dataflex.config import RunConfig
    from dataflex.data.template_table import TEMPLATES

    if key == "template":
        return TEMPLATES
    if key not in RunConfig.model_fields:
        return ()
    return ("true", "false") if RunConfig.model_fields[key].annotation is bool else choices(key)


def _datasets() -> list[str]:
    """The names in data/dataset_info.json of the working directory."""
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads(Path("data/dataset_info.json").read_text(encoding="utf-8")))
    return []


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return []


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
