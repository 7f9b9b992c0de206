"""From a conversation to token turns by a template of template_table.py: its slots filled, its parts encoded.

Templates of reasoning models also have rules for thoughts, the text between <think> and </think>.
"""

from __future__ import annotations

import datetime
import difflib
import re
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dataflex.data.conversations import (
    ASSISTANT,
    FUNCTION,
    OBSERVATION,
    RESPONSE_ROLES,
    USER,
    Conversation,
    Message,
    Unusable,
)
from dataflex.data.template_table import CONTENT, EMPTY_THOUGHT, REPLACING, TEMPLATES, Slot, Template
from dataflex.data.tools import THOUGHT, function_text, tool_prompt
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[list[int], list[int]]  # token ids of a prompt and of the response to it


@dataclass(frozen=True)
class Thinking:
    """What a template that `thinks` does with thoughts, as LLaMA-Factory's enable_thinking and mask_history say.

    `enabled`: True learns the empty thought of a response that has none, None and False put it into the prompt,
    and False takes every thought out. `last_only` does both to the last response alone: the others' thoughts
    are taken out and none is put in.
    """

    enabled: bool | None = True
    last_only: bool = False


def find_template(name: str) -> Template:
    """The template of the table with this name; a UsageError lists the names otherwise."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = difflib.get_close_matches(name, list(TEMPLATES), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"template {name!r} is unknown; {hint}There are {', '.join(TEMPLATES)}. "
        "Leave `template` out to use the tokenizer's own chat template"
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> None:
    """Give the tokenizer the eos, pad and stop tokens `template` needs, in place; None needs a pad token only.

    A token the vocabulary lacks is added, as LLaMA-Factory does, and a warning says so: the model has no
    embedding for it. The warning names as well the control tokens that the tokenizer splits.
    """
    known = len(tokenizer)
    stop_words = list(template.stop_words) if template else []
    if template and template.replace_eos:
        _set_eos(tokenizer, stop_words.pop(0))
    if tokenizer.eos_token_id is None:
        _set_eos(tokenizer, "<|endoftext|>")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stop_words:
        tokenizer.add_tokens(stop_words, special_tokens=True)
    problems = []
    if len(tokenizer) > known:
        added = tokenizer.convert_ids_to_tokens(list(range(known, len(tokenizer))))
        problems.append(
            f"the tokenizer lacks {', '.join(added)}, which the template uses; added as ids from {known} on. "
            f"A model with {known} embeddings cannot run on them"
        )
    if template and tokenizer not in _told_of_split and (split := _split_tokens(template, tokenizer)):
        _told_of_split.add(tokenizer)
        problems.append(f"the tokenizer splits {', '.join(split)}, control tokens of the template, into pieces")
    if problems:
        warnings.warn(f"{'; '.join(problems)}: choose the template made for the model", stacklevel=2)


_told_of_split: weakref.WeakSet[PreTrainedTokenizerBase] = weakref.WeakSet()  # so as to say it once

# What models mark turns with, in a template's words.
_CONTROL_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")


def _split_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens of `template` that the tokenizer splits into several tokens."""
    slots = (template.prefix, template.system, template.user, template.assistant, template.observation or ())
    texts = [part for slot in (*slots, template.function or ()) for part in slot if isinstance(part, str)]
    tokens = dict.fromkeys(token for text in texts for token in _CONTROL_TOKEN.findall(text))
    return [token for token in tokens if len(tokenizer.encode(token, add_special_tokens=False)) > 1]


def warn_of_foreign_system(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where rows without a system text get one that is of another family of models than the tokenizer's."""
    system = TEMPLATES[name].default_system.strip(" .\n")
    own = tokenizer.chat_template
    if system and own and name not in REPLACING and system not in str(own):
        warnings.warn(
            f"template {name!r} opens rows that have no system text with {system!r}, which this model's own chat "
            "template does not say; choose the template made for the model, or give rows a system text",
            stacklevel=2,
        )


def encode_turns(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    thinking: Thinking,
    day: datetime.date,
) -> list[Turn]:
    """Token ids of each (prompt, response) of a conversation; the first prompt opens with prefix and system text.

    Args:
        day: the date that a dated tool prompt tells.

    Raises:
        Unusable: tools or function calls that cannot be worded.
    """
    messages = _with_fewer_thoughts(conversation.messages, thinking) if template.thinks else conversation.messages
    encoded = []
    for index, message in enumerate(messages):
        opening: Slot = ()
        content = message.content
        if index == 0:
            system = _system_slot(template, conversation, day)
            if template.system_in_user:
                opening, content = (
                    template.prefix,
                    "".join(part for part in system[:1] if isinstance(part, str)) + content,
                )
            else:
                opening = template.prefix + system
        try:
            encoded.append(_encode(tokenizer, opening + _worded(template, message.role, content)))
        except Unusable as reason:
            raise message.unusable(reason) from None
    if template.thinks:
        _add_empty_thoughts(tokenizer, messages, encoded, thinking)
    return list(zip(encoded[::2], encoded[1::2], strict=True))


def _with_fewer_thoughts(messages: Sequence[Message], thinking: Thinking) -> list[Message]:
    last = len(messages) - 1
    return [
        replace(message, content=THOUGHT.sub("", message.content).lstrip("\n"))
        if message.role in RESPONSE_ROLES and (thinking.enabled is False or (thinking.last_only and index < last))
        else message
        for index, message in enumerate(messages)
    ]


def _add_empty_thoughts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], encoded: list[list[int]], thinking: Thinking
) -> None:
    thought = tokenizer.encode(EMPTY_THOUGHT, add_special_tokens=False)
    for index in range(len(messages) - 1 if thinking.last_only else 1, len(messages), 2):
        if "<think>" in messages[index].content or "</think>" in messages[index].content:
            continue
        if thinking.enabled:
            encoded[index] = thought + encoded[index]
        else:
            encoded[index - 1] = encoded[index - 1] + thought


def _set_eos(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    if tokenizer.eos_token != token:
        tokenizer.add_special_tokens({"eos_token": token})


def _system_slot(template: Template, conversation: Conversation, day: datetime.date) -> Slot:
    """The slots of the system turn; () where there is no system text and no tool."""
    system = conversation.system or template.default_system
    if conversation.tools:
        return _fill(template.system, system + tool_prompt(template.tool_format, conversation.tools, day))
    return _fill(template.system, system) if system else ()


def _worded(template: Template, role: str, content: str) -> Slot:
    if role == FUNCTION:
        # Where the system text opens the user turn, LLaMA-Factory reads a call's JSON alone.
        content = function_text(template.tool_format, content, with_remarks=not template.system_in_user)
    slots = {
        USER: template.user,
        ASSISTANT: template.assistant,
        OBSERVATION: template.observation or template.user,
        FUNCTION: template.function or template.assistant,
    }
    return _fill(slots[role], content)


def _fill(slot: Slot, content: str) -> Slot:
    return tuple(part.replace(CONTENT, content, 1) if isinstance(part, str) else part for part in slot)


def _encode(tokenizer: PreTrainedTokenizerBase, slot: Slot) -> list[int]:
    ids: list[int] = []
    for part in slot:
        if isinstance(part, str):
            ids += tokenizer.encode(part, add_special_tokens=False) if part else []
        elif (token := getattr(tokenizer, part.value)) is not None:
            ids.append(token)
    return ids
