"""The selectors that `component_name` can name: our own, those of installed packages, and any class by its path.

Names are looked up without importing torch or a selector; `find` and `make_selector` import the one that is used.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from dataflex.errors import UsageError
from dataflex.named import Named, suggestion

if TYPE_CHECKING:
    from dataflex.selectors.protocol import Selector

GROUP = "dataflex.selectors"
FORM = "package.module:Class"


@dataclass(frozen=True)
class NamedSelector(Named):
    """A selector of the table, and what it looks at."""

    reads: Literal["rows", "base", "adapter"]
    """The rows alone, the frozen base model, or the model with its adapter."""
    compares: bool
    """Whether it compares rows with validation rows."""
    cost: str
    """Of a selection, where the forward and backward pass of each row is 1."""


SELECTORS = {
    "less": NamedSelector(
        "dataflex.selectors.less:LessSelector",
        "rows whose Adam step points where the validation gradient points",
        reads="adapter",
        compares=True,
        cost="1",
    ),
    "random": NamedSelector(
        "dataflex.selectors.random:RandomSelector",
        "rows by chance, as a baseline",
        reads="rows",
        compares=False,
        cost="0",
    ),
    "rds": NamedSelector(
        "dataflex.selectors.rds:RdsSelector",
        "rows whose hidden states are near the validation rows'",
        reads="base",
        compares=True,
        cost="0.5, once a run",
    ),
    "bm25": NamedSelector(
        "dataflex.selectors.bm25:Bm25Selector",
        "rows that share rare words with the validation rows",
        reads="rows",
        compares=True,
        cost="0, once a run",
    ),
    "embed": NamedSelector(
        "dataflex.selectors.embed:EmbedSelector",
        "rows whose sentence embeddings are near the validation rows'",
        reads="rows",
        compares=True,
        cost="the embedding model's forward pass, once a run",
    ),
    "loss": NamedSelector(
        "dataflex.selectors.loss:LossSelector",
        "rows of high, medium or low loss (loss_band)",
        reads="adapter",
        compares=False,
        cost="0.5",
    ),
    "length": NamedSelector(
        "dataflex.selectors.length:LengthSelector",
        "rows with many supervised tokens, as a control",
        reads="rows",
        compares=False,
        cost="0",
    ),
}


PACKAGED = {
    "less-contrast": {"name": "less", "params": {"marginal": True, "contrast": "pool"}},
    "less-contrast-rds": {"name": "less+rds", "params": {"marginal": True, "contrast": "pool"}},
}
"""Components beside the selectors themselves: a selector and keys that find more together."""


def packaged_components() -> dict[str, dict[str, Any]]:
    """The components that `component_name` can name without a components file: each selector of the table with no
    parameters, and PACKAGED."""
    return {**{name: {"name": name, "params": {}} for name in SELECTORS}, **PACKAGED}


def source_of(name: str) -> str:
    """Where the class behind `name` stands, as `package.module:Class`. A name of the table comes first.

    Raises:
        UsageError: for a name that is nowhere, with the names there are; for a name that two packages give; for a
            path that is not of the form `package.module:Class`.
    """
    if name in SELECTORS:
        return SELECTORS[name].source
    if ":" in name:
        if not _is_path(name):
            raise UsageError(f"selector {name!r}: expected {FORM}")
        return name
    points = entry_points(group=GROUP)
    found = [point for point in points if point.name == name]
    if not found:
        names = [*packaged_components(), *sorted({point.name for point in points} - SELECTORS.keys())]
        raise UsageError(f"no selector {name!r}; there are {', '.join(names)}, and {FORM}{suggestion(name, names)}")
    sources = {point.value.partition("[")[0].replace(" ", "") for point in found}
    if len(sources) > 1:
        raise UsageError(f"selector {name!r}: the packages {_packages(found)} each have one; name yours as {FORM}")
    [source] = sources
    if not _is_path(source):
        raise UsageError(
            f"selector {name!r}: its entry point in the package {_packages(found)} is {source!r}; expected {FORM}"
        )
    return source


def parts_of(name: str) -> list[str]:
    """The selectors that `a+b` names; `name` alone where it is one."""
    return name.split("+")


def reads_of(name: str) -> set[str]:
    """What the selectors of `name` look at, as `NamedSelector.reads` says; a selector of another package may look at
    anything."""
    return {SELECTORS[part].reads if part in SELECTORS else "adapter" for part in parts_of(name)}


def compares(name: str) -> bool:
    """Whether a selector of the table that `name` names compares rows with validation rows."""
    return any(SELECTORS[part].compares for part in parts_of(name) if part in SELECTORS)


def check_name(name: str) -> str:
    """`name`, if it names a selector, or several by `+`; UsageError as `source_of`. No selector is imported."""
    parts = parts_of(name)
    for part in parts:
        source_of(part)
    if len(set(parts)) < len(parts):
        raise UsageError(f"selector {name!r} names one selector twice; name each once")
    return name


def find(name: str) -> type[Selector]:
    """The class behind `name`, imported.

    Raises:
        UsageError: as `source_of`; and where the module does not import, has no such class, or the class no `score`.
    """
    source = source_of(name)
    what = f"selector {name!r}" if source == name else f"selector {name!r} ({source})"
    module_name, _, class_name = source.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # the module is there
            raise _failed(what, f"importing {module_name}", error) from error
        raise UsageError(
            f"{what}: there is no module {error.name}; install its package, or put its folder on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise _failed(what, f"importing {module_name}", error) from error
    try:
        found = operator.attrgetter(class_name)(module)
    except AttributeError:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(
            f"{what}: the module {module_name} has no class {class_name}{suggestion(class_name, classes)}"
        ) from None
    if not isinstance(found, type) or not callable(getattr(found, "score", None)):
        raise UsageError(
            f"{what}: expected a class with a method `score(self, situation)`, found {_kind(found)}; "
            "python -m pydoc dataflex.selectors shows one"
        )
    return found


def make_selector(name: str) -> Selector:
    """An instance of the class behind `name`; of several by `+`, one that combines them.

    Raises:
        UsageError: as `find`; and where the class cannot be made without arguments, or its `score` does not take
            exactly a situation.
    """
    parts = parts_of(check_name(name))
    if len(parts) > 1:
        from dataflex.selectors.combined import CombinedSelector

        return CombinedSelector([make_selector(part) for part in parts])
    found = find(name)
    try:
        selector = found()
    except (Exception, SystemExit) as error:
        raise _failed(f"selector {name!r}", f"{found.__name__}(), made without arguments,", error) from error
    try:
        inspect.signature(selector.score).bind("situation")
    except TypeError as error:
        raise UsageError(
            f"selector {name!r}: expected a method `score(self, situation)` in {found.__name__}, "
            f"found `score{inspect.signature(found.score)}` ({error})"
        ) from None
    return selector


def _failed(what: str, doing: str, error: BaseException) -> UsageError:
    lines = str(error).strip().splitlines() or ["no message"]
    return UsageError(f"{what}: {doing} fails with {type(error).__name__}: {lines[0]}")


def _is_path(text: str) -> bool:
    """Whether `text` has the form of FORM."""
    parts = text.split(":")
    return len(parts) == 2 and all(name.isidentifier() for part in parts for name in part.split("."))


def _packages(points: Iterable[EntryPoint]) -> str:
    return ", ".join(sorted({point.dist.name if point.dist else "?" for point in points}))


def _kind(found: object) -> str:
    return f"the class {found.__name__} without it" if isinstance(found, type) else f"a {type(found).__name__}"
