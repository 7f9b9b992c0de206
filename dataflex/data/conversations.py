"""From a record, however its dataset lays it out, to a Conversation: turns of user and assistant in alternation.

Rules are LLaMA-Factory 0.9.5's, so the same rows are trained on. A record that cannot be used raises
Unusable with a short reason; nothing else is raised, whatever the record holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from dataflex.data.records import Source, Tags

USER, ASSISTANT, OBSERVATION, FUNCTION = "user", "assistant", "observation", "function"
PROMPT_ROLES = (USER, OBSERVATION)
RESPONSE_ROLES = (ASSISTANT, FUNCTION)

NO_RESPONSE = "no response"
NO_ALTERNATION = "roles do not alternate"

# LLaMA-Factory 0.9.5 adds this to every `openai` row without tools, and so must whoever wants its tokens.
OPENAI_SYSTEM = "detailed thinking off"


class Unusable(ValueError):
    """A row that cannot be trained on; `str()` of it is the reason."""


@dataclass(frozen=True)
class Message:
    """One turn. The content of a function turn is JSON: {"name": …, "arguments": …} or a list of them."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Prompt and response in alternation, an even number of turns; `tools` is a JSON list or empty."""

    messages: list[Message]
    system: str = ""
    tools: str = ""


def to_conversation(source: Source, record: dict[str, Any]) -> Conversation:
    """The conversation a record of `source` holds.

    Raises:
        Unusable: "no response", "roles do not alternate", or "malformed record (…)" with what is wrong.
    """
    conversation = _READERS[source.formatting](source, record)
    try:
        "".join([conversation.system, conversation.tools, *(m.content for m in conversation.messages)]).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no tokenizer can read
        _malformed("a text is not valid Unicode")
    return conversation


def _from_alpaca(source: Source, record: dict[str, Any]) -> Conversation:
    columns = source.columns
    messages: list[Message] = []
    for pair in _list(record, columns.history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            _malformed(f"{columns.history} is not a list of [prompt, response] pairs")
        messages += [Message(USER, pair[0]), Message(ASSISTANT, pair[1])]
    parts = [_text(record, columns.prompt), _text(record, columns.query)]
    messages.append(Message(USER, "\n".join(part for part in parts if part)))
    response = record.get(columns.response) if columns.response else None
    if columns.response is None:
        raise Unusable(f"{NO_RESPONSE} (columns leave out response: naming some unsets the others)")
    if not isinstance(response, str):
        raise Unusable(NO_RESPONSE)
    messages.append(Message(ASSISTANT, response))
    return Conversation(messages, _text(record, columns.system), _tools(record, columns.tools))


def _from_sharegpt(source: Source, record: dict[str, Any]) -> Conversation:
    tags = source.tags
    roles = _roles(source)
    turns, system = _split_system(source, record)
    messages = []
    for turn in turns:
        name = _role_of(turn, source)
        role = roles.get(name)
        if role is None and name in _unset_roles(tags):
            raise Unusable(f"{NO_ALTERNATION} ({name!r} has no tag: naming some unsets the others)")
        if role is None or role not in _expected_roles(len(messages)):
            raise Unusable(NO_ALTERNATION)
        messages.append(Message(role, _content_of(turn, tags.content)))
    return Conversation(_whole(messages), system, _tools(record, source.columns.tools))


def _from_messages(source: Source, record: dict[str, Any]) -> Conversation:
    tags = source.tags
    roles = _roles(source)
    turns, system = _split_system(source, record)
    messages: list[Message] = []
    results: list[str] = []  # of tools, until the turn that reads them
    for turn in turns:
        name = _role_of(turn, source)
        role = roles.get(name)
        if role is None:
            _malformed(f"unknown role {name!r}")
        if role in RESPONSE_ROLES and turn.get("tool_calls"):
            role, content = FUNCTION, _called_functions(turn["tool_calls"], plain=source.formatting == "messages")
        else:
            content = _content_of(turn, tags.content)
        if role == OBSERVATION:
            results.append(content)
            continue
        if results:
            messages.append(Message(OBSERVATION, "\n</tool_response>\n<tool_response>\n".join(results)))
            results = []
        messages.append(Message(role, content))
    if any(message.role not in _expected_roles(place) for place, message in enumerate(messages)):
        raise Unusable(NO_ALTERNATION)
    return Conversation(_whole(messages), system, _tools(record, source.columns.tools))


def _from_openai(source: Source, record: dict[str, Any]) -> Conversation:
    conversation = _from_messages(source, record)
    system = conversation.system
    if conversation.tools:
        system = system and system + "\n"
    elif not system:
        system = OPENAI_SYSTEM
    elif OPENAI_SYSTEM not in system and "detailed thinking on" not in system:
        system += "\n" + OPENAI_SYSTEM
    return Conversation(conversation.messages, system, conversation.tools)


def _roles(source: Source) -> dict[str, str]:
    tags = source.tags
    pairs = [(tags.user, USER), (tags.assistant, ASSISTANT), (tags.observation, OBSERVATION), (tags.function, FUNCTION)]
    return {tag: role for tag, role in pairs if tag is not None}


def _unset_roles(tags: Tags) -> set[str]:
    """Names of roles that would have a tag if the entry named none."""
    return {
        name
        for role in ("observation", "function", "system")
        if getattr(tags, role) is None and (name := getattr(Tags(), role))
    }


def _expected_roles(place: int) -> tuple[str, ...]:
    return RESPONSE_ROLES if place % 2 else PROMPT_ROLES


def _whole(messages: list[Message]) -> list[Message]:
    if not messages or len(messages) % 2:
        raise Unusable(NO_RESPONSE)
    return messages


def _split_system(source: Source, record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The turns, and the system text: a first system turn's, else the system column's."""
    columns, tags = source.columns, source.tags
    turns = _list(record, columns.messages)
    for turn in turns:
        if not isinstance(turn, dict):
            _malformed(f"{columns.messages} holds a turn that is {_kind(turn)}")
    if turns and tags.system is not None and turns[0].get(tags.role) == tags.system:
        return turns[1:], _content_of(turns[0], tags.content)
    return turns, _text(record, columns.system)


def _called_functions(calls: Any, plain: bool) -> str:
    """The functions of OpenAI `tool_calls` as JSON; `plain` also opens arguments that are JSON in a string."""
    if not isinstance(calls, list):
        _malformed("tool_calls is not a list")
    functions = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            _malformed("a tool call names no function")
        if plain:
            function = {**function, "arguments": _opened(function.get("arguments"))}
        functions.append(function)
    return json.dumps(functions, ensure_ascii=False)


def _opened(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        opened = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return opened if isinstance(opened, dict) else arguments


def _tools(record: dict[str, Any], column: str | None) -> str:
    tools = record.get(column) if column else None
    if isinstance(tools, list | dict):
        return json.dumps(tools, ensure_ascii=False)
    return _text(record, column)


def _list(record: dict[str, Any], column: str | None) -> list[Any]:
    value = record.get(column) if column else None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        _malformed(f"{column} is {_kind(value)}, not a list")
    return value


def _text(record: dict[str, Any], column: str | None) -> str:
    value = record.get(column) if column else None
    if value is None:
        return ""
    if not isinstance(value, str):
        _malformed(f"{column} is {_kind(value)}, not a text")
    return value


def _role_of(turn: dict[str, Any], source: Source) -> str:
    role = turn.get(source.tags.role)
    if not isinstance(role, str):
        _malformed(f"a turn of {source.columns.messages} has no {source.tags.role}")
    return role


def _content_of(turn: dict[str, Any], key: str | None) -> str:
    content = turn.get(key)
    if not isinstance(content, str):
        _malformed(f"{key} of a turn is {_kind(content)}, not a text")
    return content


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _malformed(what: str) -> NoReturn:
    raise Unusable(f"malformed record ({what})")


_READERS = {
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "openai": _from_openai,
    "messages": _from_messages,
}
