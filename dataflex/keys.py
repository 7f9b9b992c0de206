"""What a key of a run is for: written beside the key's type in RunConfig, read by whoever needs a list of keys.

No list of keys is written by hand anywhere else. What a run, a store or a score file came from, which paths are
looked up, what a command cannot do without: each is derived from these marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Decides(Enum):
    """The part of a result that a key's value decides. A result made with another value is another result."""

    ROWS = "rows"
    """Which examples there are and which tokens they have; told by the fingerprint of the examples."""
    MODEL = "model"
    """The frozen base model and the arithmetic of its forward pass."""
    TRAINING = "training"
    """The adapter that training ends with."""
    DIRECTION = "direction"
    """The direction Γ of a row's gradient."""
    PROJECTION = "projection"
    """The linear map from directions to stored rows."""
    STORE = "store"
    """The number format of stored rows."""
    SCORES = "scores"
    """How cosines become one score a row."""
    SELECTION = "selection"
    """Which of the scored rows are written."""
    MERGE = "merge"
    """The merged model."""
    EVALUATION = "evaluation"
    """What an evaluation measures."""
    COMPARISON = "comparison"
    """Which arms a comparison has. A comparison that was made takes further ones, so they tell no two apart."""
    NOTHING = "nothing"
    """How the work is done, where it is written and what is shown; the result is the same."""


TRAINS = ("warmup", "train", "dynamic")
COMMANDS = (*TRAINS, "grads", "score", "select", "merge", "bench", "inspect", "eval", "compare", "report")

USERS: Mapping[Decides, tuple[str, ...]] = {
    Decides.ROWS: (*TRAINS, "grads", "score", "bench", "inspect", "eval", "compare"),
    Decides.MODEL: (*TRAINS, "grads", "score", "merge", "bench", "eval", "compare"),
    Decides.TRAINING: (*TRAINS, "compare"),
    Decides.DIRECTION: ("dynamic", "grads", "score", "bench"),
    Decides.PROJECTION: ("dynamic", "grads", "score", "bench"),
    Decides.STORE: ("dynamic", "grads", "bench"),
    Decides.SCORES: ("dynamic", "score"),
    Decides.SELECTION: ("select",),
    Decides.MERGE: ("merge",),
    Decides.EVALUATION: ("eval", "compare"),
    Decides.COMPARISON: ("compare",),
    Decides.NOTHING: COMMANDS,
}
"""Which commands use a key, where the key does not say it itself."""


@dataclass(frozen=True)
class Key:
    """The mark of one key."""

    decides: Decides
    used_by: tuple[str, ...] = ()
    """The commands that use the key; those of `USERS` when left out."""
    needed_by: tuple[str, ...] = ()
    """The commands that cannot run without a value."""
    path: Literal["input", "output"] | None = None
    """Whether the value names something to read or something to write."""
    by_content: bool = False
    """The value is a name; what it stands for decides, and is told by a fingerprint of its own."""
    component: bool = False
    """A component's `params` may set the key."""

    @property
    def users(self) -> tuple[str, ...]:
        """The commands that use the key."""
        return self.used_by or USERS[self.decides]

    @property
    def compared(self) -> bool:
        """Whether the value itself tells two results apart: what rows and inputs are made of is told by content."""
        idle = (Decides.NOTHING, Decides.ROWS, Decides.COMPARISON)
        return self.decides not in idle and not self.by_content


def mark_of(metadata: Iterable[Any]) -> Key | None:
    """The Key among a field's annotations; None where there is none."""
    return next((item for item in metadata if isinstance(item, Key)), None)


def select_keys(marks: Mapping[str, Key], wanted: Callable[[Key], bool]) -> tuple[str, ...]:
    """The names, in order, whose mark is `wanted`."""
    return tuple(name for name, mark in marks.items() if wanted(mark))
