"""Turns by the tokenizer's own chat template (Jinja), for runs that set no `template`.

A chat template renders whole conversations and says nothing of who wrote which character, so the
conversation is rendered up to each turn and the differences tell. Prompts and responses are encoded
apart, as they are when the model answers.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dataflex.data.conversations import ASSISTANT, FUNCTION, OBSERVATION, USER, Conversation, Message, Unusable
from dataflex.data.templates import Turn
from dataflex.data.tools import function_text, parse_calls, parse_tools, split_remarks, tool_prompt
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")

Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A UsageError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UsageError(
            "this model's tokenizer has no chat template of its own; set `template` to the one the model is made for, "
            "for instance llama3, qwen or chatml"
        )


def encode_chat_turns(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, enable_thinking: bool | None, day: datetime.date
) -> list[Turn]:
    """Token ids of each (prompt, response); a response ends with the template's end token.

    Args:
        enable_thinking: False is handed to the template; else the template's own default stands.
        day: the date that a dated template tells.

    Raises:
        Unusable: tools that cannot be worded, or a conversation that the chat template refuses or rewrites.
    """
    # A template that knows no tool calls would leave them out unseen: word them as text instead.
    native = "tool_calls" in str(tokenizer.chat_template)
    offered: list[Any] = parse_tools(conversation.tools) if conversation.tools and native else []
    options: dict[str, Any] = {"enable_thinking": False} if enable_thinking is False else {}
    template = dated_template(tokenizer.get_chat_template(tools=offered or None), day)

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tools=offered or None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
            return str(rendered)
        except Exception as error:  # a template is a program of its own and may raise anything
            reason = " ".join(str(error).split())[:80]
            raise Unusable(f"refused by the chat template ({reason}); set `template`, or take such turns out") from None

    messages = [_as_chat(message, native) for message in conversation.messages]
    system = conversation.system
    if conversation.tools and not native:
        system = (system or _default_system(render)) + tool_prompt("default", conversation.tools, day)
    opening = [{"role": "system", "content": system}] if system else []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    try:
        texts = split_turns(render, opening, messages)
    except _Rewritten as error:
        reason = "rewritten by the chat template once more turns follow; set `template`, or take the later turns out"
        raise conversation.messages[error.index].unusable(reason) from None
    return [(encode(prompt), encode(response)) for prompt, response in texts]


def dated_template(template: str, day: datetime.date) -> str:
    """A chat template with `day` written in wherever it asks for the present date.

    transformers hands templates a clock, `strftime_now`, and lets no caller set it.

    Raises:
        UsageError: where the form of the date is no plain text in the template.
    """
    dated = _CLOCK.sub(lambda asked: json.dumps(day.strftime(asked["form"])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise UsageError(
            "this model's chat template tells the present date in a form that is worked out as it runs, so a run could "
            "not keep its day; set `template`"
        )
    return dated


class _Rewritten(Exception):
    """The template words a turn otherwise once later turns follow."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def split_turns(render: Render, opening: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The text of each prompt and response; joined, the texts are the text of the conversation."""
    whole = render(opening + messages)
    turns, done = [], 0
    for index in range(1, len(messages), 2):
        start = _response_start(render, whole, opening + messages[:index])
        end = _response_end(render, whole, opening + messages[: index + 1], start or 0)
        if start is None or end is None or not done <= start <= end:
            raise _Rewritten(index)
        turns.append((whole[done:start], whole[start:end]))
        done = end
    return turns


def _response_start(render: Render, whole: str, until: list[dict[str, Any]]) -> int | None:
    before = render(until)
    if not whole.startswith(before):
        return None
    # Some templates open a thought in the generation prompt that the finished text does not have.
    prompt = render(until, add_generation_prompt=True)
    return max(len(before), _shared(whole, prompt))


def _response_end(render: Render, whole: str, until: list[dict[str, Any]], start: int) -> int | None:
    rendered = render(until)
    if whole.startswith(rendered):
        return len(rendered)
    # Some templates word the last turn otherwise than earlier ones (an empty thought before it, the thoughts of
    # earlier ones cut): the end is where the same closing follows the same content.
    content = until[-1]["content"]
    for part in (content.strip(), content.rpartition("</think>")[2].strip()):
        closing = rendered[rendered.rfind(part) + len(part) :]
        at = whole.find(part + closing, start) if part and closing and part in rendered else -1
        if at >= 0:
            return at + len(part) + len(closing)
    return None


def _as_chat(message: Message, native: bool) -> dict[str, Any]:
    if message.role == FUNCTION:
        if not native:
            return {"role": ASSISTANT, "content": function_text("default", message.content, with_remarks=True)}
        remarks, text = split_remarks(message.content)
        remarks = remarks.rstrip("\n")  # what stands between it and the calls is the template's to say
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parse_calls(text)
        ]
        return {"role": ASSISTANT, "content": remarks, "tool_calls": calls}
    if message.role == OBSERVATION:
        return {"role": "tool" if native else USER, "content": message.content}
    return {"role": message.role, "content": message.content}


def _default_system(render: Render) -> str:
    """The system text that a template writes where a conversation has none."""
    user = {"role": "user", "content": "x"}
    given, empty = render([user]), render([{"role": "system", "content": ""}, user])
    if len(given) <= len(empty):
        return ""
    head = _shared(given, empty)
    return given[head : len(given) - (len(empty) - head)]


def _shared(one: str, other: str) -> int:
    """Length of the common beginning of two texts, in characters."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
