"""Classes that a key of the configuration names. Nothing is imported before its name is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Named:
    """A class of a table, and its line of help."""

    source: str
    """`package.module:Class`."""
    help: str

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.source.partition(":")
        return getattr(import_module(module), name)


def suggestion(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'less'?` where one of `names` is like `name`, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listing(table: Mapping[str, Named]) -> str:
    """The names of a table with their help, as sentences."""
    return " ".join(f"{name}: {entry.help}." for name, entry in table.items())
