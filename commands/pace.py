"""How fast a task goes and how long it will still take."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class Pace:
    """The pace of one task: the mean over all of it, so that it lasts through steps of a minute. Units that an earlier
    run did, and pauses, are no part of it. A thread that draws may read it at any moment."""

    total: int
    unit: str
    done: int = 0
    pauses: Mapping[str, int] = field(default_factory=dict)
    """How many pauses of a kind are still to begin, as far as that is known."""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begun, self._done_before = self.clock(), self.done
        self._to_begin = dict(self.pauses)
        self._paused: dict[str, list[float]] = {}  # kind → the seconds of each pause that has ended
        self._pause: tuple[str, float] | None = None  # the one under way, and when it began

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """The block is no part of the pace."""
        self._to_begin[kind] = max(0, self._to_begin.get(kind, 0) - 1)
        began = self.clock()
        self._pause = kind, began
        try:
            yield
        finally:
            self._paused = {**self._paused, kind: [*self._paused.get(kind, []), self.clock() - began]}
            self._pause = None

    @property
    def seconds(self) -> float:
        """Since the task began, with its pauses."""
        return self.clock() - self._begun

    @property
    def _own_seconds(self) -> float:
        paused, pause = sum(map(sum, self._paused.values())), self._pause
        return self.seconds - paused - (self.clock() - pause[1] if pause else 0.0)

    def rate(self) -> str:
        """Units a second, or below one a second the seconds of one; nothing before the first."""
        done, seconds = self.done - self._done_before, self._own_seconds
        if not done or not seconds:
            return ""
        one = self.unit.removesuffix("s")
        return f"{done / seconds:.1f} {self.unit}/s" if done >= seconds else f"{seconds / done:.1f} s/{one}"

    def left(self) -> str:
        """The time left, with the pauses to come at the mean length of their kind; "over" it where none of a kind has
        ended yet; nothing before the first unit."""
        done = self.done - self._done_before
        if not done:
            return ""
        seconds, more = self._own_seconds / done * max(0, self.total - self.done), False
        paused, pause = self._paused, self._pause
        for kind, number in list(self._to_begin.items()):
            lengths = paused.get(kind, [])
            more = more or (number > 0 and not lengths)
            seconds += number * sum(lengths) / max(1, len(lengths))
        if pause:
            kind, since = pause
            lengths = paused.get(kind, [])
            more = more or not lengths
            seconds += max(0.0, sum(lengths) / max(1, len(lengths)) - (self.clock() - since))
        return f"{'over ' if more else ''}{datetime.timedelta(seconds=round(seconds))}"
