"""Selected rows as records that read back to the same conversations when the file is given as a dataset."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dataflex.data.catalog import recognise
from dataflex.data.conversations import (
    ASSISTANT,
    FUNCTION,
    OBSERVATION,
    Conversation,
    Message,
    Unusable,
    to_conversation,
)
from dataflex.data.records import Source, iter_records
from dataflex.errors import UsageError
from dataflex.files import Digest
from dataflex.progress import SILENT, Progress

REPORTED = 1000  # rows between two signs of progress

Taken = tuple[Source, dict[str, Any]]
"""A record and the source it stands in."""


def take_records(
    sources: Sequence[Source],
    rows: Collection[int],
    digest: Digest | None = None,
    *,
    expected: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[int, Taken], int]:
    """The records of those `rows` that there are, and how many records there are in all.

    Row numbers count through the sources. Every source is read once, and no other record is kept.

    Args:
        digest: is given the bytes that `data_hash` hashes.
        expected: how many records there probably are, for `progress`.
    """
    wanted, taken = set(rows), {}
    pool = ((source, record) for source in sources for record in iter_records(source, digest))
    number = -1
    with progress.task("reading", expected, "rows") as task:
        for number, pair in enumerate(pool):
            if number in wanted:
                taken[number] = pair
            if number % REPORTED == REPORTED - 1:
                task.advance(REPORTED)
    return taken, number + 1


def subset_records(taken: Sequence[Taken], rows: Sequence[int]) -> list[dict[str, Any]]:
    """What a subset file holds for `taken`, the records of `rows`.

    They are the source's own records where a file of them is recognised and says the same; sources of
    several formats, or with columns of their own, give `messages` (and `tools`) records instead.

    Raises:
        UsageError: a row that has no conversation to be written as messages.
    """
    if _reads_back(taken):
        return [dict(record) for _, record in taken]
    return [_as_record(source, record, row) for (source, record), row in zip(taken, rows, strict=True)]


def as_messages(conversation: Conversation) -> dict[str, Any]:
    """The conversation as an OpenAI-style record: `messages`, and `tools` if there are any."""
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    messages += [_as_message(message) for message in conversation.messages]
    record: dict[str, Any] = {"messages": messages}
    if conversation.tools:
        record["tools"] = _opened_tools(conversation.tools)
    return record


def _as_message(message: Message) -> dict[str, Any]:
    if message.role == FUNCTION:
        calls = _plain_calls(message.content)
        if calls is None:
            return {"role": "function_call", "content": message.content}
        return {"role": ASSISTANT, "content": "", "tool_calls": calls}
    return {"role": "tool" if message.role == OBSERVATION else message.role, "content": message.content}


def _plain_calls(content: str) -> list[dict[str, Any]] | None:
    """The calls as OpenAI's `tool_calls`, None where that would change what the turn says."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
        for call in calls
    ):
        return None
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


def _opened_tools(tools: str) -> Any:
    try:
        opened = json.loads(tools)
    except (ValueError, RecursionError):
        return tools
    return opened if isinstance(opened, list) else tools


def _reads_back(chosen: Sequence[Taken]) -> bool:
    """Whether a file of these records, as they are, is recognised and holds the same conversations."""
    if not chosen:
        return True
    try:
        direct = [recognise(source.name, Path(source.path or source.name), record) for source, record in chosen]
    except UsageError:
        return False
    if len({layout.formatting for layout in direct}) > 1:
        return False
    return all(
        _outcome(layout, record) == _outcome(source, record)
        for layout, (source, record) in zip(direct, chosen, strict=True)
    )


def _outcome(source: Source, record: dict[str, Any]) -> Conversation | str:
    try:
        return to_conversation(source, record)
    except Unusable as reason:
        return str(reason)


def _as_record(source: Source, record: dict[str, Any], row: int) -> dict[str, Any]:
    try:
        converted = as_messages(to_conversation(source, record))
    except Unusable as reason:
        raise UsageError(f"row {row} of {source.name} cannot be written as messages: {reason}; leave it out") from None
    if record.get("subtask") is not None:
        converted["subtask"] = record["subtask"]
    return converted
