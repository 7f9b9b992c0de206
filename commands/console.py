"""What a person or a program sees: the result on stdout, everything else on stderr, bars only on a terminal."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from dataflex.json_text import json_of_figures
from dataflex.progress import Interrupted

SHORT = 20  # characters of a cell that is never broken
BRIEF = 1.0  # seconds: a task that takes less is not told where there is no terminal
EVERY = 30.0
"""Seconds between two lines about a task where there is no terminal."""


def rate_of(done: float, seconds: float, unit: str) -> str:
    """Units a second, or below one a second the seconds of one; nothing before the first."""
    if not done or not seconds:
        return ""
    one = unit.removesuffix("s")
    return f"{done / seconds:.1f} {unit}/s" if done >= seconds else f"{seconds / done:.1f} s/{one}"


def left_of(done: float, total: float, seconds: float) -> str:
    """The time left at the mean pace of the whole task, so that it lasts through steps of a minute."""
    if not done:
        return "-:--:--"
    return str(datetime.timedelta(seconds=round(seconds / done * max(0.0, total - done))))


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(rate_of(task.completed, task.elapsed or 0, task.fields["unit"]), style="cyan", no_wrap=True)


class _Left(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(f"left {left_of(task.completed, task.total or 0, task.elapsed or 0)}", style="cyan", no_wrap=True)


class _Shown(ProgressColumn):
    """What the task last had to show, for instance its loss."""

    def render(self, task: RichTask) -> Text:
        return Text("  ".join(f"{name} {value:.4g}" for name, value in task.fields["shown"].items()), style="magenta")


class _Bar:
    """One running task on a terminal."""

    def __init__(self, console: Console, progress: Progress, description: str, total: int, unit: str) -> None:
        self.console = console
        self.progress = progress
        self.shown: dict[str, float] = {}
        self.id = progress.add_task(description, total=total, unit=unit, shown=self.shown)

    def advance(self, amount: int = 1, **shown: float) -> None:
        self.shown.update(shown)
        self.progress.update(self.id, advance=amount, shown=self.shown)
        if amount:
            self.console.end_if_asked()


class _Count:
    """One running task where there is no terminal: a line every half a minute, and its end."""

    def __init__(self, console: Console, description: str, total: int, unit: str) -> None:
        self.console = console
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.started = self.told = time.monotonic()
        self.shown: dict[str, float] = {}

    def advance(self, amount: int = 1, **shown: float) -> None:
        self.done += amount
        self.shown.update(shown)
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told, seconds = now, now - self.started
            parts = [f"{self.done}/{self.total} {self.unit}", rate_of(self.done, seconds, self.unit)]
            left = left_of(self.done, self.total, seconds)
            self.console.say(f"{self.description}: {', '.join(filter(None, parts))}, {left} left")
        if amount:
            self.console.end_if_asked()


class Console:
    """The one place that prints. It is also the library's `Progress`."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, first: bool = True) -> None:
        self.as_json = as_json
        self.quiet = quiet = quiet or not first
        self.first = first
        self.out = sys.stdout  # the session sends what libraries print there to stderr, so keep hold of it
        self.err = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self.stop_code = 0  # the exit code with which the work is to end at its next commit; 0: it is to go on
        self.tasks_open = 0
        self._progress: Progress | None = None

    def end_if_asked(self) -> None:
        """Raise Interrupted if the work is to end."""
        if self.stop_code:
            raise Interrupted(self.stop_code)

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[_Bar | _Count]:
        self.tasks_open += 1
        try:
            with self._shown_task(description, total, unit) as task:
                yield task
        finally:
            self.tasks_open -= 1

    @contextlib.contextmanager
    def _shown_task(self, description: str, total: int, unit: str) -> Iterator[_Bar | _Count]:
        if not self.err.is_terminal or self.err.is_dumb_terminal or self.quiet:
            count = _Count(self, description, total, unit)
            yield count
            seconds = time.monotonic() - count.started
            if seconds >= BRIEF:
                shown = "".join(f", {name} {value:.4g}" for name, value in count.shown.items())
                self.say(f"{description}: {count.done} {unit} in {seconds:.0f} s{shown}")
            return
        progress, outermost = self._progress, self._progress is None
        if progress is None:
            wide = self.err.width >= 110
            progress = self._progress = Progress(
                TextColumn("[bold]{task.description:<16}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24 if wide else 8),
                TextColumn(
                    "{task.completed:>4.0f}/{task.total:.0f} {task.fields[unit]}", table_column=Column(no_wrap=True)
                ),
                _Rate(table_column=Column(no_wrap=True)),
                _Left(table_column=Column(no_wrap=True)),
                *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []),
                _Shown(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.err,
                transient=True,
                expand=True,
            )
            progress.start()
        bar = _Bar(self, progress, description, total, unit)
        try:
            yield bar
        finally:
            progress.remove_task(bar.id)
            if outermost:
                progress.stop()
                self._progress = None

    def say(self, message: str) -> None:
        """A line of the log."""
        self.err.print(message, style="dim", markup=False, soft_wrap=True)

    def next(self, command: str) -> None:
        """The command that comes next, ready to be pasted."""
        self.err.print(f"next: {command}", style="dim", markup=False, soft_wrap=True)

    def warning(self, message: str) -> None:
        self.err.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def error(self, message: str) -> None:
        """The one message of a failed command; also under --quiet."""
        RichConsole(stderr=True, highlight=False).print(f"error: {message}", style="red", markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table under a title; numbers stand right. Without `columns` it has no head."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="dim",
            box=box.SIMPLE_HEAD,
            show_header=bool(columns),
            pad_edge=False,
        )
        for index in range(len(rows[0]) if rows else len(columns)):
            numeric = all(isinstance(row[index], (int, float)) for row in rows)
            short = all(len(_shown(row[index])) <= SHORT for row in rows)
            heading = columns[index] if columns else ""
            if numeric and columns:  # a number is never broken, so its heading is what takes two lines
                table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
            else:
                table.add_column(heading, overflow="fold", no_wrap=short)  # a broken histogram cannot be read
        for row in rows:
            table.add_row(*[Text(_shown(value)) for value in row])
        self.err.print(table)

    def lines(self, title: str, lines: Sequence[str]) -> None:
        """Lines under a title, each cut at the width of the terminal."""
        self.err.print(title, style="bold", markup=False)
        for line in lines:
            self.err.print(f" {line}", markup=False, no_wrap=True, overflow="ellipsis", crop=True)
        self.err.print()

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Names and values under a title."""
        self.table(title, [], list(facts.items()))

    def result(self, paths: Sequence[Any], facts: dict[str, Any]) -> None:
        """The result: one path a line, or `facts` as one JSON object, in which `written` are those paths. Of several
        processes the first prints it."""
        if not self.first:
            return
        written = [str(path) for path in paths if isinstance(path, Path)]
        lines = [json_of_figures({**facts, "written": written} if written else facts)] if self.as_json else paths
        for line in lines:
            print(line, file=self.out, flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none"
    return str(value)
