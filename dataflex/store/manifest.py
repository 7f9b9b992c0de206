"""What a gradient store came from: written into it, compared before it is gone on with and before it is scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from dataflex.config import MARKS, default_of
from dataflex.errors import UsageError
from dataflex.keys import Decides
from dataflex.origin import explain
from dataflex.store.layout import RowLayout

# Whether two rows can be compared: both are images under one map, taken at one set of parameters.
COMPARABLE = (Decides.MODEL, Decides.PROJECTION)


# What a field of two manifests has in common where they are of the same work, and of stores that can be compared.
SAME_WORK = {"same_work": True}
SAME_SPACE = {"same_work": True, "same_space": True}


@dataclass(frozen=True)
class Manifest(Mapping[str, Any]):
    """The manifest as a mapping from names to JSON's values: the fields below and the keys in `settings`.

    Only `store_dtype` and `proj_dim` are needed to read a store; another program's may lack the rest.
    """

    store_dtype: str = field(metadata=SAME_WORK)
    proj_dim: int = field(metadata=SAME_SPACE)
    """k, the width of a row; the number of parameters where nothing is projected."""
    parameters: list[Any] = field(default_factory=list, metadata=SAME_SPACE)
    """[name, size] of each LoRA tensor, in the order in which they are flattened."""
    base_model: str | None = field(default=None, metadata=SAME_SPACE)
    """Fingerprint of the frozen base model."""
    adapter: str | None = field(default=None, metadata=SAME_SPACE)
    """Fingerprint of the adapter's tensors and scalings."""
    dtype: str | None = field(default=None, metadata=SAME_SPACE)
    """Of the model's matrix products."""
    projector_device: str | None = field(default=None, metadata=SAME_SPACE)
    """The kind of GPU, for a projector whose numbers depend on it."""
    moments: str | None = field(default=None, metadata=SAME_WORK)
    """Fingerprint of Adam's moments, for directions that need them."""
    split: str | None = field(default=None, metadata=SAME_WORK)
    """train or eval: which side of a score the rows may stand on."""
    gradient_type: str | None = field(default=None, metadata=SAME_WORK)
    """The direction that the rows hold."""
    adam_formula: str | None = field(default=None, metadata=SAME_WORK)
    step: int | None = field(default=None, metadata=SAME_WORK)
    """Optimizer steps behind the checkpoint."""
    learning_rate: float | None = field(default=None, metadata=SAME_WORK)
    """Of the latest of these steps."""
    data: str | None = field(default=None, metadata=SAME_WORK)
    """Fingerprint of the examples: row, tokens, labels, subtask, dataset."""
    files: str | None = None
    """sha256 over the data files' bytes, by which `select` knows the data again."""
    dataset: list[str] | None = None
    """The names of the data sets."""
    datasets: list[Any] = field(default_factory=list)
    """[name, first kept row] of each data set, in row order."""
    model_name_or_path: str | None = None
    token_budget: int | None = None
    prompt_date: str | None = None
    """The day that dated prompts tell, kept for a store that is taken up again."""
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By `data` and `base_model`: what they were made from, to tell why a fingerprint is another one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Every further key of the configuration that decides the rows, the model, the directions or the projection."""

    @property
    def is_projected(self) -> bool:
        """Whether a row is a projection. Where that is not known, it is taken for none."""
        return self.settings.get("projector", "none") != "none"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote, or another program's.

        Raises:
            ValueError, TypeError, KeyError: if it is not an object with at least store_dtype and proj_dim.
        """
        values = json.loads(text)
        typed = {name: values.pop(name) for name in _NAMES if name in values}
        RowLayout(typed["store_dtype"], int(typed["proj_dim"]))
        return cls(**typed, settings=values)

    def to_json(self) -> str:
        """The manifest as a JSON text."""
        return json.dumps(dict(self))

    @cached_property
    def _values(self) -> dict[str, Any]:
        return {**self.settings, **{name: getattr(self, name) for name in _NAMES}}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def has_reference(self) -> bool:
        """Whether the store sums the plain gradients of the reference rows that `contrast` names."""
        return bool(self.settings.get("contrast"))

    @property
    def row_layout(self) -> RowLayout:
        """How the rows are kept."""
        return RowLayout(self.store_dtype, self.proj_dim)

    def summary(self) -> dict[str, Any]:
        """The manifest without its long parts: what scores keep of it, and a reader is shown."""
        long = ("parameters", "facts", "datasets")
        return {name: value for name, value in self.items() if name not in long and value is not None}

    def work_differences(self, now: Manifest) -> list[str]:
        """A phrase for everything by which `now` is the manifest of other rows; empty for the same work.

        A key that this manifest does not know had its default value then. The keys that decide the rows are told
        by `data`, the fingerprint of the examples.
        """
        phrases = []
        for name in _fields("same_work"):
            if self[name] == now[name]:
                continue
            if name in ("data", "base_model"):
                phrases += explain(name, self.facts.get(name, {}), now.facts.get(name, {}))
            else:
                phrases.append(_phrase(name, self[name], now[name], "then", "now"))
        for key in now.settings:
            before, after = self.settings.get(key, default_of(key)), now.settings[key]
            if before != after and MARKS[key].compared:
                phrases.append(_phrase(key, before, after, "then", "now"))
        return phrases

    def space_differences(self, other: Manifest) -> list[str]:
        """A phrase for everything that keeps the rows of two stores from being compared."""
        known = [key for key in {**self.settings, **other.settings} if key in MARKS]
        further = [key for key in known if MARKS[key].compared and MARKS[key].decides in COMPARABLE]
        return [
            _phrase(name, self.get(name), other.get(name), "against", "")
            for name in [*_fields("same_space"), *further]
            if self.get(name) != other.get(name)
        ]


_NAMES = tuple(item.name for item in fields(Manifest) if item.name != "settings")


def _fields(kind: str) -> list[str]:
    return [item.name for item in fields(Manifest) if item.metadata.get(kind)]


def _phrase(name: str, first: Any, second: Any, between: str, after: str) -> str:
    short = all(len(str(value)) <= 60 for value in (first, second))
    shown = f"({first} {between}, {second} {after})" if after else f"({first} {between} {second})"
    return f"{name} {shown}" if short else name


def check_same_work(path: object, found: Manifest, wanted: Manifest) -> None:
    """Raise a UsageError naming every difference between a store's manifest and the one this run would write."""
    differing = found.work_differences(wanted)
    if differing:
        raise UsageError(
            f"gradient store {path} came from something else: {', '.join(differing)}; "
            "give --overwrite to write it anew, or another output"
        )
