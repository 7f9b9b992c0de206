"""Names and their texts under headings, as help shows them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDEST = 100  # columns: longer lines are hard to read


def help_console() -> Console:
    """A console that is at most WIDEST wide."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    return console


def print_lines(console: Console, heading: str, lines: Iterable[tuple[str, str]]) -> None:
    """A heading, and below it a name and its text a line; nothing where there is no line."""
    lines = list(lines)
    if not lines:
        return
    console.print(heading, style="bold", markup=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in lines:
        table.add_row(Text(name, style="magenta"), Text(text))
    console.print(Padding(table, (0, 0, 0, 2)))
