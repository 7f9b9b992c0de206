"""How the library reports progress. The caller decides whether a terminal, a notebook or nothing shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Interrupted(BaseException):
    """The user asked the work to end here. It is no failure, so it is no Exception.

    A Progress may raise it out of `Task.advance`. On its way out, each piece of work that keeps something commits
    what was reported and says what it keeps (`add_note`).
    """

    def __init__(self, exit_code: int = 130) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Task(Protocol):
    """One piece of work with a known end."""

    def advance(self, amount: int = 1, **shown: Any) -> None:
        """`amount` more is done; `shown` (for instance loss=2.1) stands beside the bar.

        Raises:
            Interrupted: if the work is to end here; never where `amount` is 0.
        """

    def pause(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """The block does something that no unit of the work is, for instance a selection: its time says nothing of how
        long the units take."""


class Progress(Protocol):
    """What receives reports of progress."""

    def task(
        self, description: str, total: int, unit: str, done: int = 0, pauses: Mapping[str, int] | None = None
    ) -> contextlib.AbstractContextManager[Task]:
        """Announce `total` units of work, of which an earlier run did `done`; the task ends with the block. `pauses`
        says how many pauses of each kind are expected."""

    def say(self, message: str) -> None:
        """One line worth keeping in the log."""


class Once:
    """Passes a line of the log on the first time that it is said: for work that reads the same rows many times."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[str] = set()

    def task(
        self, description: str, total: int, unit: str, done: int = 0, pauses: Mapping[str, int] | None = None
    ) -> contextlib.AbstractContextManager[Task]:
        return self._progress.task(description, total, unit, done, pauses)

    def say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._progress.say(message)


class SilentTask:
    def advance(self, amount: int = 1, **shown: Any) -> None:
        pass

    def pause(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Silent:
    """Shows nothing: the default for calls from Python."""

    @contextlib.contextmanager
    def task(
        self, description: str, total: int, unit: str, done: int = 0, pauses: Mapping[str, int] | None = None
    ) -> Iterator[Task]:
        yield SilentTask()

    def say(self, message: str) -> None:
        pass


SILENT = Silent()
