"""What a person or a program sees: the result on stdout, everything else on stderr, bars only on a terminal."""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Task as RichTask
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from dataflex.commands.pace import Pace
from dataflex.json_text import json_of_figures
from dataflex.progress import Interrupted

MANY = 8  # columns of a table that stand closer, so that numbers fit 80 characters
PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    **{0x7F: 0x2421},
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""The character that is shown for a control character, by code; Unicode has pictures of those below 0x80."""
SHORT = 20  # characters of a cell that is never broken
BRIEF = 1.0  # seconds: a task that takes less is not told where there is no terminal
EVERY = 30.0
"""Seconds between two lines about a task where there is no terminal."""


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(task.fields["pace"].rate(), no_wrap=True)


class _Left(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        pace = task.fields["pace"]
        so_far = f"{datetime.timedelta(seconds=int(pace.seconds))} so far"  # a first batch may take a minute
        return Text(f"left {left}" if (left := pace.left()) else so_far, no_wrap=True)


class _Shown(ProgressColumn):
    """What the task last had to show, for instance its loss."""

    def render(self, task: RichTask) -> Text:
        return Text("  ".join(f"{name} {value:.4g}" for name, value in task.fields["shown"].items()), style="magenta")


class _Bar:
    """One running task on a terminal."""

    def __init__(self, console: Console, progress: Progress, description: str, pace: Pace) -> None:
        self.console, self.progress, self.pace = console, progress, pace
        self.pause = pace.pause
        self.shown: dict[str, float] = {}
        self.id = progress.add_task(
            description, total=pace.total, completed=pace.done, unit=pace.unit, pace=pace, shown=self.shown
        )

    def advance(self, amount: int = 1, **shown: float) -> None:
        self.pace.done += amount
        self.shown.update(shown)
        self.progress.update(self.id, completed=self.pace.done, shown=self.shown)
        if amount:
            self.console.end_if_asked()


class _Count:
    """One running task where there is no terminal: a line every half a minute, and its end."""

    def __init__(self, console: Console, description: str, pace: Pace) -> None:
        self.console, self.description, self.pace = console, description, pace
        self.pause = pace.pause
        self.told = time.monotonic()
        self.shown: dict[str, float] = {}

    def advance(self, amount: int = 1, **shown: float) -> None:
        pace = self.pace
        pace.done += amount
        self.shown.update(shown)
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told = now
            left = pace.left() and f"{pace.left()} left"
            parts = [f"{pace.done}/{pace.total} {pace.unit}", pace.rate(), left]
            self.console.say(f"{self.description}: {', '.join(filter(None, parts))}")
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
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="dim")
        self._said = time.monotonic()
        """When the last line was printed or the last task ended."""
        self._next: str | None = None

    def end_if_asked(self) -> None:
        """Raise Interrupted if the work is to end."""
        if self.stop_code:
            raise Interrupted(self.stop_code)

    @contextlib.contextmanager
    def task(
        self, description: str, total: int, unit: str, done: int = 0, pauses: Mapping[str, int] | None = None
    ) -> Iterator[_Bar | _Count]:
        self.tasks_open += 1
        try:
            with self._shown_task(description, Pace(total, unit, done, pauses or {})) as task:
                yield task
        finally:
            self.tasks_open -= 1

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """While the block runs, something moves on a terminal: the bars of tasks, else the time since the last line."""
        if not self._moves or self._live is not None:
            yield
            return
        with Live(get_renderable=self._view, console=self.err, transient=True, refresh_per_second=10) as self._live:
            try:
                yield
            finally:
                self._live = None

    @property
    def _moves(self) -> bool:
        return self.err.is_terminal and not self.err.is_dumb_terminal and not self.quiet

    def _view(self) -> RenderableType:
        if self.tasks_open and "_bars" in vars(self):  # made by the thread that works, which this one is not
            return self._bars.get_renderable()
        seconds = int(time.monotonic() - self._said)
        if seconds < BRIEF:
            return Text("")
        self._spinner.update(text=Text(str(datetime.timedelta(seconds=seconds)), style="dim"))
        return self._spinner

    @functools.cached_property
    def _bars(self) -> Progress:
        wide, whole = self.err.width >= 110, Column(no_wrap=True)
        return Progress(
            TextColumn("[bold]{task.description:<16}", table_column=whole),
            BarColumn(bar_width=24 if wide else 8),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f} {task.fields[unit]}", table_column=whole),
            _Rate(table_column=whole),
            _Left(table_column=whole),
            *([TimeElapsedColumn(table_column=whole)] if wide else []),
            _Shown(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.err,
            expand=True,
        )

    @contextlib.contextmanager
    def _shown_task(self, description: str, pace: Pace) -> Iterator[_Bar | _Count]:
        if not self._moves:
            count = _Count(self, description, pace)
            yield count
            if pace.seconds >= BRIEF:
                shown = "".join(f", {name} {value:.4g}" for name, value in count.shown.items())
                self.say(f"{description}: {pace.done} {pace.unit} in {pace.seconds:.0f} s{shown}")
            return
        bar = _Bar(self, self._bars, description, pace)
        try:
            with self.alive():
                yield bar
        finally:
            self._bars.remove_task(bar.id)
            self._said = time.monotonic()

    def say(self, message: str) -> None:
        """A line of the log."""
        self.err.print(visible(message), style="dim", markup=False, soft_wrap=True)
        self._said = time.monotonic()

    def next(self, command: str) -> None:
        """The command that comes next, ready to be pasted; it is shown below the result."""
        self._next = command

    def warning(self, message: str) -> None:
        self.err.print(_headed("warning:", "bold yellow", message), soft_wrap=True)
        self._said = time.monotonic()

    def error(self, message: str) -> None:
        """The one message of a failed command; also under --quiet."""
        RichConsole(stderr=True, highlight=False).print(_headed("error:", "bold red", message), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table under a title; numbers stand right. Without `columns` it has no head."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="dim",
            box=box.SIMPLE_HEAD,
            show_header=bool(columns),
            padding=(0, 1) if len(columns) < MANY else (0, 1, 0, 0),
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
            self.err.print(f" {visible(line)}", markup=False, no_wrap=True, overflow="ellipsis", crop=True)
        self.err.print()

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Names and values under a title."""
        self.table(title, [], list(facts.items()))

    def result(self, paths: Sequence[Any], facts: dict[str, Any]) -> None:
        """The result: one path a line, or `facts` as one JSON object, in which `written` are those paths. Of several
        processes the first prints it."""
        if self._live is not None:
            self._live.stop()  # what is printed to stdout would stand in its line
        if not self.first:
            return
        written = [str(path) for path in paths if isinstance(path, Path)]
        lines = [json_of_figures({**facts, "written": written} if written else facts)] if self.as_json else paths
        for line in lines:
            print(line, file=self.out, flush=True)
        if self._next:
            self.say(f"next: {self._next}")


def _headed(head: str, style: str, message: str) -> Text:
    """Only the head has a colour: yellow sentences cannot be read on a light ground."""
    return Text.assemble((head, style), f" {visible(message)}")


def visible(text: str) -> str:
    """`text` with a picture for each control character: those of a row would steer the terminal that shows them."""
    return text.translate(PICTURES)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none"
    return visible(str(value))
