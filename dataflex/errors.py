"""The two ways a command can fail on purpose; anything else is a bug and may show a traceback.

The message is all the user sees, so it names the file, the key or the row, says what was
expected, and what to do.
"""

from __future__ import annotations

import re


class DataflexError(Exception):
    """Failed while running (exit code 1)."""

    exit_code = 1


class UsageError(DataflexError):
    """Wrong usage, config or data; nothing has been written (exit code 2)."""

    exit_code = 2


# What Python itself says of a value that a library did not expect; its words are about the library's code.
_UNEXPECTED_VALUE = (TypeError, AttributeError, IndexError, AssertionError, NotImplementedError, RecursionError)


def reason_of(error: BaseException) -> str:
    """What a library's error says, in words that can stand within a sentence: no colon or full stop at the end, no
    names of Python's types."""
    text = str(error).strip()
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r}" if error.args else "a key is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, _UNEXPECTED_VALUE) or not text:
        return "it holds a value of another type than expected"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    first = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", first)
    return re.sub(r"\b[A-Z]\w*(?:Error|Exception): |^Error while deserializing header: ", "", first).rstrip(".:, ")
