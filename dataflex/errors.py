"""The two ways a command can fail on purpose; anything else is a bug and may show a traceback.

The message is all the user sees, so it names the file, the key or the row, says what was
expected, and what to do.
"""

from __future__ import annotations


class DataflexError(Exception):
    """Failed while running (exit code 1)."""

    exit_code = 1


class UsageError(DataflexError):
    """Wrong usage, config or data; nothing has been written (exit code 2)."""

    exit_code = 2
