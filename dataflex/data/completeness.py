"""Whether the tokens of a conversation say everything that its record says.

A chat template may leave turns out, cut thoughts or ignore calls, and a tokenizer may not know a character. So the
tokens are decoded, and each turn's text must be in its part of them, in order. White space and Unicode's composed and
decomposed forms count as the same: templates strip, tokenizers normalise.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dataflex.data.conversations import FUNCTION, RESPONSE_ROLES, Conversation, Message
from dataflex.data.templates import Thinking, Turn
from dataflex.data.tools import NO_REMARKS, THOUGHT, parse_calls, parse_tools, split_remarks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Missing(NamedTuple):
    """What tokens do not say, a phrase each: texts that are `lost`, and what the config has `left_out`."""

    lost: tuple[str, ...]
    left_out: tuple[str, ...]


def find_missing(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turns: Sequence[Turn], thinking: Thinking
) -> Missing:
    """What `conversation` says and its encoded `turns`, before any cut, do not.

    Raises:
        Unusable: the text beside a function call is missing, so the call is not what the record shows.
    """
    decoded = [_decode(tokenizer, part) for turn in turns for part in turn]
    lost: list[str] = []
    left_out: list[str] = []
    if not _says_system(decoded, conversation):
        lost.append("the system text")
    if not all(any(_says(text, name) for text in decoded) for name in _tool_names(conversation.tools)):
        lost.append("the tools on offer")
    last = len(decoded) - 1
    for index, (message, text) in enumerate(zip(conversation.messages, decoded, strict=True)):
        thought, rest = _parted(message)
        if not _says(text, thought):
            asked_for = thinking.enabled is False or (thinking.last_only and index < last)
            if asked_for:
                left_out.append("thoughts, which enable_thinking or mask_history takes out")
            else:
                lost.append("thoughts")
        if message.role != FUNCTION:
            if not _says(text, rest):
                lost.append(f"the text of {message.role} turns")
            continue
        remarks, calls = split_remarks(rest)
        if not _says(text, remarks):
            raise message.unusable(NO_REMARKS)
        if not all(_says(text, part) for part in _texts_of_calls(calls)):
            lost.append("function calls")
    return Missing(tuple(dict.fromkeys(lost)), tuple(dict.fromkeys(left_out)))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _parted(message: Message) -> tuple[str, str]:
    """A response, split into its thought and the text after the thought."""
    thought = THOUGHT.search(message.content) if message.role in RESPONSE_ROLES else None
    if thought is None:
        return "", message.content
    return thought.group(1), message.content.replace(thought.group(0), "", 1)


def _tool_names(tools: str) -> Iterator[str]:
    for tool in parse_tools(tools) if tools else []:
        function = tool.get("function")
        name = (function if isinstance(function, dict) else tool).get("name")
        if isinstance(name, str):
            yield name


def _texts_of_calls(calls: str) -> Iterator[str]:
    for call in parse_calls(calls):
        yield call.name
        yield from _leaves(call.arguments)


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers in a JSON value, with the names of fields."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif type(value) is int:
        yield str(value)


def _says(where: str, text: str) -> bool:
    """Whether `text` stands in `where`, as it is or as JSON spells it."""
    if text.strip() in where:
        return True
    bare = _bare(where)
    spellings = (text, *(json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)))
    return any(_bare(spelling) in bare for spelling in spellings)


def _says_system(decoded: Sequence[str], conversation: Conversation) -> bool:
    """Whether the system text is in the decoded text, not only in a turn that has the same words."""
    system = _bare(conversation.system)
    if not system:
        return True
    of_turns = sum(_bare(message.content).count(system) for message in conversation.messages)
    return sum(_bare(text).count(system) for text in decoded) > of_turns


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())
