"""JSON as people keep it, read object by object; and records as lines of JSON that any program reads.

A file may hold one object a line, objects that follow each other in any layout, arrays of objects, or all of
these, whatever its suffix is. pyarrow's and `datasets`' readers are not used: they give a column one type, and
refuse or rewrite records whose fields differ in type. A file of any size is never in memory as a whole.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import re
import uuid
from collections.abc import Iterator
from typing import IO, Any

from dataflex.errors import UsageError

CHUNK = 1 << 20  # characters

_SPACE = re.compile("[\\s\ufeff]*")  # with the byte order marks of files that were joined
_SURROGATE = re.compile("[\ud800-\udfff]")
# NaN is how pandas writes a value that is missing.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
# The text that json may need to see before it knows that a value is wrong and not merely cut off.
_LONGEST_TOKEN = len("-Infinity")


def iter_objects(handle: IO[str], where: str) -> Iterator[dict[str, Any]]:
    """The objects in a JSON text, in order; those in arrays at the top level are taken one by one. NaN is null.

    Raises:
        UsageError: the text is not JSON, or has something else than objects; begins with `where` and the line.
    """
    window = _Window(handle)
    try:
        for row, value in enumerate(_values(window)):
            if not isinstance(value, dict):
                found = "null" if value is None else type(value).__name__
                offset, more = f"line {window.line()}", f"row {row}"
                if window.is_array:  # often on one line
                    offset, more = more, offset
                raise UsageError(f"{where}, {offset}: expected an object, found {found} ({more})")
            yield value
    except RecursionError:
        raise UsageError(f"{where}, line {window.line()}: nested too deeply to be read") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{where}, line {window.line()}: not JSON ({reason})") from None


def json_line(record: Any) -> str:
    """`record` as JSON without line breaks, for UTF-8: dates as ISO 8601, decimals as digits, bytes as base64.

    Raises:
        UsageError: JSON has no way to say a value; names its field.
    """
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_as_text)
    except (TypeError, ValueError):
        raise UsageError(
            f"{_unwritable(record, '')}, which JSON cannot hold; leave it out or write it as a text"
        ) from None
    except RecursionError:
        raise UsageError("it is nested too deeply to be written; leave it out") from None
    # Half of a surrogate pair has no UTF-8; JSON can still spell it.
    return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text)


def json_of_figures(value: Any, indent: int | None = None) -> str:
    """`value`, the figures of a run, as JSON. A figure that is not finite, as a loss that overflowed, is null: JSON has
    no word for it."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Window:
    """The part of a text that is under the decoder; more is read when it runs out."""

    def __init__(self, handle: IO[str]) -> None:
        self.handle = handle
        self.text = ""
        self.offset = 0
        self.start = 0  # of the last value
        self.lines_before = 0  # line ends before `text`
        self.is_array = False  # from its start

    def line(self) -> int:
        """The line on which the last value starts, from 1."""
        return self.lines_before + self.text.count("\n", 0, self.start) + 1

    def next_character(self) -> str:
        """The next character that is not white space, which stays; "" at the end."""
        while True:
            self.offset = self.start = _SPACE.match(self.text, self.offset).end()  # type: ignore[union-attr] # it matches nothing as well
            if self.offset < len(self.text):
                return self.text[self.offset]
            if not self.read(CHUNK):
                return ""

    def take(self) -> str:
        """The next character that is not white space; the decoder moves past it."""
        character = self.next_character()
        self.offset += len(character)
        return character

    def read(self, size: int) -> bool:
        """Drop what is done and read on; False at the end of the file."""
        more = self.handle.read(size)
        if more:
            self.lines_before += self.text.count("\n", 0, self.offset)
            self.text, self.offset, self.start = self.text[self.offset :] + more, 0, 0
        return bool(more)

    def decode(self) -> Any:
        """The value that begins here."""
        self.next_character()
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.offset)
            except json.JSONDecodeError as error:
                if not self._may_be_cut_off(error) or not self.read(size):
                    if self.text[error.pos :].strip():  # else the value that starts here has no end
                        self.start = error.pos
                    raise
                size *= 2  # a long value is decoded again but a few times
            else:
                self.offset = end
                return value

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend the value; a file that is wrong early on is not read to its end."""
        return error.msg.startswith("Unterminated string") or len(self.text) - error.pos <= _LONGEST_TOKEN


def _values(window: _Window) -> Iterator[Any]:
    window.is_array = window.next_character() == "["
    while character := window.next_character():
        if character == "[":
            yield from _items(window)
        else:
            yield window.decode()


def _items(window: _Window) -> Iterator[Any]:
    window.take()
    if window.next_character() == "]":
        window.take()
        return
    separator = ","
    while separator == ",":
        yield window.decode()
        separator = window.take()
    if separator != "]":
        raise ValueError("Expecting ',' or ']'" if separator else "the array is not closed")


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError


def _unwritable(value: Any, name: str) -> str | None:
    """Name and kind of the first value in `value` that JSON cannot hold."""
    if isinstance(value, dict):
        parts = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"{name}[{offset}]", item) for offset, item in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}"
    else:
        try:
            json.dumps(value, default=_as_text)
        except TypeError:
            return f"{name} is of type {type(value).__name__}"
        return None
    return next((found for key, item in parts if (found := _unwritable(item, key))), None)
