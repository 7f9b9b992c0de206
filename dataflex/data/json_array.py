"""A JSON array read item by item, so that a file of any size is never in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20  # characters

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def iter_array(path: Path) -> Iterator[Any]:
    """The items of the JSON array in a file; an object that stands alone counts as an array of one.

    Raises:
        ValueError: the file is not JSON; with the place, as json.loads gives it.
        TypeError: it is JSON, but neither array nor object; says what it is.
        OSError, UnicodeDecodeError, RecursionError: it cannot be read.
    """
    with open(path, encoding="utf-8-sig") as handle:
        window = _Window(handle)
        if window.next_character() != "[":
            yield from _whole(path)
            return
        window.place += 1
        separator = window.take() if window.next_character() == "]" else ","
        while separator == ",":
            try:
                yield window.decode()
            except ValueError:
                _explain(path)
            window.next_character()
            separator = window.take()
        if separator != "]" or window.next_character():
            _explain(path)


class _Window:
    """The part of a text that is under the decoder; more is read when it runs out."""

    def __init__(self, handle: IO[str]) -> None:
        self.handle = handle
        self.text = ""
        self.place = 0

    def next_character(self) -> str:
        """The next character that is not white space, which stays; "" at the end."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.read(CHUNK):
                return ""

    def take(self) -> str:
        """The character under the decoder, and one further."""
        self.place += 1
        return self.text[self.place - 1 : self.place]

    def read(self, size: int) -> bool:
        """Drop what is done and read on; False at the end of the file."""
        more = self.handle.read(size)
        self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)

    def decode(self) -> Any:
        """The value that begins here. A value that the window cuts off looks wrong until more is read."""
        self.next_character()
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
            except ValueError:
                if not self.read(size):
                    raise
                size *= 2  # what is wrong, not cut off, is read again but a few times
            else:
                self.place = end
                return value


def _whole(path: Path) -> list[Any]:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(value, dict):
        return [value]
    raise TypeError(type(value).__name__)


def _explain(path: Path) -> None:
    """Raise json's own error, which gives line and column in the file."""
    json.loads(path.read_text(encoding="utf-8-sig"))
    raise ValueError("it changed while it was read")
