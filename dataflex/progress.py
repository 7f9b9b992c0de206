"""How the library reports progress. The caller decides whether a terminal, a notebook or nothing shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


class Progress(Protocol):
    """What receives reports of progress."""

    def task(self, description: str, total: int, unit: str) -> contextlib.AbstractContextManager[Task]:
        """Announce `total` units of work; the task ends with the block."""

    def say(self, message: str) -> None:
        """One line worth keeping in the log."""


class Once:
    """Passes a line of the log on the first time that it is said: for work that reads the same rows many times."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[str] = set()

    def task(self, description: str, total: int, unit: str) -> contextlib.AbstractContextManager[Task]:
        return self._progress.task(description, total, unit)

    def say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._progress.say(message)


class _SilentTask:
    def advance(self, amount: int = 1, **shown: Any) -> None:
        pass


class Silent:
    """Shows nothing: the default for calls from Python."""

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, message: str) -> None:
        pass


SILENT = Silent()
