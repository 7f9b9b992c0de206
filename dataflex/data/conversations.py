"""From a record, however its dataset lays it out, to a Conversation: turns of user and assistant in alternation.

Rules are LLaMA-Factory 0.9.5's where it reads a record, so the same rows are trained on; more is read than it reads.
A record that cannot be used raises Unusable with a reason; nothing else is raised, whatever the record holds. What a
record says and the conversation leaves out is listed, for nothing is to be lost without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from dataflex.data.records import Source, Tags

USER, ASSISTANT, OBSERVATION, FUNCTION, SYSTEM = "user", "assistant", "observation", "function", "system"
PROMPT_ROLES = (USER, OBSERVATION)
RESPONSE_ROLES = (ASSISTANT, FUNCTION)

NO_RESPONSE = "no response"
NO_ALTERNATION = "roles do not alternate"

# LLaMA-Factory 0.9.5 adds this to every `openai` row without tools, and so must whoever wants its tokens.
OPENAI_SYSTEM = "detailed thinking off"

SHAREGPT_TAGS = Tags()
CHAT_TAGS = Tags("role", "content", "user", "assistant", observation="tool", function="function_call", system="system")

# Names of roles beside those of the tags: of OpenAI's and other programs' files. OpenAI's old `function` is a result.
_OTHER_NAMES = {
    **{"user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT},
    **{"tool": OBSERVATION, "observation": OBSERVATION, "function": OBSERVATION, "function_call": FUNCTION},
    **{"system": SYSTEM, "developer": SYSTEM},
}
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # DeepSeek's, vLLM's, gpt-oss's
_LINKS = ("id", "tool_call_id", "index")  # say which turn belongs to which, and nothing else
_NOT_CONTENT = ("subtask", "dataflex")
_EMPTY: tuple[Any, ...] = (None, "", [], {})


class Unusable(ValueError):
    """A row that cannot be trained on; `str()` of it is the reason."""


@dataclass(frozen=True)
class Message:
    """One turn. The content of a function turn is JSON: {"name": …, "arguments": …} or a list of them.

    A thought stands before it, a text beside it makes it `text <tool_call>JSON</tool_call>`. `turn` is its number in
    the record, counted from 1, where the record has turns.
    """

    role: str
    content: str
    turn: int | None = field(default=None, compare=False)

    def unusable(self, reason: object) -> Unusable:
        """An error that says which turn `reason` is of."""
        role = ASSISTANT if self.role == FUNCTION else self.role
        return Unusable(f"turn {self.turn} ({role}): {reason}" if self.turn else str(reason))


@dataclass(frozen=True)
class Conversation:
    """Prompt and response in alternation, an even number of turns; `tools` is a JSON list or empty."""

    messages: list[Message]
    system: str = ""
    tools: str = ""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """What the record says beside this, a phrase each."""


def to_conversation(source: Source, record: dict[str, Any]) -> Conversation:
    """The conversation a record of `source` holds.

    Raises:
        Unusable: with what is wrong, at which turn, and the way out. Turns are counted from 1.
    """
    try:
        conversation = _READERS[source.formatting](source, record)
    except RecursionError:
        _malformed("it is nested too deeply to be written; flatten it")
    try:
        "".join([conversation.system, conversation.tools, *(m.content for m in conversation.messages)]).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no tokenizer can read
        _malformed("a text is not valid Unicode: it has half of a surrogate pair; write the character whole")
    left_out = (*conversation.left_out, *_unread_fields(source, record))
    return replace(conversation, left_out=tuple(dict.fromkeys(left_out)))


@dataclass(frozen=True)
class _Turn:
    """A turn as its record has it. `number` counts from 1; `name` is the role as the record calls it."""

    number: int
    name: str
    role: str | None
    fields: dict[str, Any]
    tags: Tags

    def __str__(self) -> str:
        return f"turn {self.number} ({self.name[:40] if self.name.isprintable() else ascii(self.name[:40])})"

    def refuse(self, what: str) -> NoReturn:
        raise Unusable(f"{self}: {what}")


def _from_alpaca(source: Source, record: dict[str, Any]) -> Conversation:
    columns = source.columns
    messages: list[Message] = []
    for pair in _list(record, columns.history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            _malformed(f"{columns.history} is not a list of [prompt, response] pairs")
        messages += [Message(USER, pair[0]), Message(ASSISTANT, pair[1])]
    parts = [_text(record, columns.prompt), _text(record, columns.query)]
    messages.append(Message(USER, "\n".join(part for part in parts if part)))
    if columns.response is None:
        raise Unusable(f"{NO_RESPONSE} (columns leave out response: naming some unsets the others)")
    if record.get(columns.response) is None:
        raise Unusable(NO_RESPONSE)
    messages.append(Message(ASSISTANT, _text(record, columns.response)))
    return Conversation(messages, _text(record, columns.system), _tools(record, columns.tools))


def _from_sharegpt(source: Source, record: dict[str, Any]) -> Conversation:
    turns, system, left_out = _turns(source, record)
    if turns and turns[0].tags == CHAT_TAGS != source.tags:
        return _from_messages(source, record)
    messages = [
        (turn, Message(turn.role or "", _with_thought(turn, _content(turn)), turn.number)) for turn in _known(turns)
    ]
    left_out += [note for turn in turns for note in _unread_of_turn(turn, calls_are_read=False)]
    return Conversation(_whole(messages), system, _tools(record, source.columns.tools), tuple(left_out))


def _from_messages(source: Source, record: dict[str, Any]) -> Conversation:
    turns, system, left_out = _turns(source, record)
    messages: list[tuple[_Turn, Message]] = []
    results: list[str] = []  # of tools, until the turn that reads them
    for turn in _known(turns):
        left_out += _unread_of_turn(turn, calls_are_read=True)
        calls = _calls(turn, plain=source.formatting != "openai") if turn.role in RESPONSE_ROLES else ""
        text = _with_thought(turn, _content(turn, missing="" if calls else None))
        if turn.role == OBSERVATION:
            results.append(text)
            last_result = turn
            continue
        if results:
            joined = "\n</tool_response>\n<tool_response>\n".join(results)
            messages.append((last_result, Message(OBSERVATION, joined, last_result.number)))
            results = []
        role, text = (FUNCTION, _beside(text, calls)) if calls else (turn.role or "", text)
        messages.append((turn, Message(role, text, turn.number)))
    if results:
        left_out.append("tool results that no turn answers")
    tools = _tools(record, source.columns.tools)
    if not tools and source.formatting == "messages":
        tools = _tools(record, "functions")  # OpenAI's name for them when calls were `function_call`
    return Conversation(_whole(messages), system, tools, tuple(left_out))


def _from_openai(source: Source, record: dict[str, Any]) -> Conversation:
    conversation = _from_messages(source, record)
    system = conversation.system
    if conversation.tools:
        system = system and system + "\n"
    elif not system:
        system = OPENAI_SYSTEM
    elif OPENAI_SYSTEM not in system and "detailed thinking on" not in system:
        system += "\n" + OPENAI_SYSTEM
    return replace(conversation, system=system)


def _turns(source: Source, record: dict[str, Any]) -> tuple[list[_Turn], str, list[str]]:
    """The turns without a leading system turn; the system text, of this turn or the column; and the turns left out."""
    columns = source.columns
    fields = _list(record, columns.messages)
    for index, turn in enumerate(fields):
        if not isinstance(turn, dict):
            raise Unusable(f"turn {index + 1} of {columns.messages} is {_kind(turn)}, not an object with a role")
    tags = _tags_of(fields[0], source.tags) if fields else source.tags
    roles = _roles(tags)
    turns = []
    for index, turn in enumerate(fields):
        name = turn.get(tags.role)
        if not isinstance(name, str):
            raise Unusable(f"turn {index + 1} of {columns.messages} has no {tags.role}; say there whose turn it is")
        turns.append(_Turn(index + 1, name, roles.get(name), turn, tags))
    column = _text(record, columns.system)
    if not turns or turns[0].role != SYSTEM:
        return turns, column, []
    system = _content(turns[0])
    left_out = list(_unread_of_turn(turns[0], calls_are_read=False))
    if column and column != system:
        left_out.append("the system column, beside a system turn")
    return turns[1:], system, left_out


def _tags_of(turn: dict[str, Any], tags: Tags) -> Tags:
    """The tags by which turns like this one are read: ShareGPT's keys where OpenAI's are expected, or the reverse."""
    standard = {SHAREGPT_TAGS: CHAT_TAGS, CHAT_TAGS: SHAREGPT_TAGS}
    other = standard.get(tags)
    return other if other is not None and tags.role not in turn and other.role in turn else tags


def _roles(tags: Tags) -> dict[str, str]:
    """Roles by name. Tags that an entry gives leave out the roles it leaves out."""
    given = {
        **{tags.user: USER, tags.assistant: ASSISTANT, tags.observation: OBSERVATION},
        **{tags.function: FUNCTION, tags.system: SYSTEM},
    }
    others = _OTHER_NAMES if tags in (SHAREGPT_TAGS, CHAT_TAGS) else {}
    if tags.system is not None:
        others = {**others, "developer": SYSTEM}
    return {**others, **{name: role for name, role in given.items() if name is not None}}


def _known(turns: Sequence[_Turn]) -> Iterator[_Turn]:
    """The turns up to the first one whose role a conversation does not have."""
    for turn in turns:
        if turn.role == SYSTEM:
            turn.refuse("a system turn is not the first; move its text into the first turn or the system column")
        if turn.role is None and turn.name in _unset_roles(turn.tags):
            turn.refuse(f"{NO_ALTERNATION} ({turn.name!r} has no tag: naming some unsets the others)")
        if turn.role is None:
            turn.refuse(f"{NO_ALTERNATION} (unknown role; expected {', '.join(_roles(turn.tags))})")
        yield turn


def _unset_roles(tags: Tags) -> set[str]:
    """Names of roles that have a tag by default and lose it because the entry names tags."""
    return {
        name
        for role in ("observation", "function", "system")
        if getattr(tags, role) is None and (name := getattr(Tags(), role))
    }


def _whole(messages: Sequence[tuple[_Turn, Message]]) -> list[Message]:
    """The messages, if they are prompts and responses in alternation."""
    for index, (turn, message) in enumerate(messages):
        if message.role not in (RESPONSE_ROLES if index % 2 else PROMPT_ROLES):
            wanted = "a response" if index % 2 else "a prompt"
            turn.refuse(f"{NO_ALTERNATION} ({wanted} is expected here; join turns of one side, or take one out)")
    if not messages or len(messages) % 2:
        raise Unusable(f"{NO_RESPONSE} (the last is {messages[-1][0]})" if messages else NO_RESPONSE)
    return [message for _, message in messages]


def _content(turn: _Turn, missing: str | None = None) -> str:
    """What a turn says; text parts are joined by line ends. `missing` stands for null, where null is allowed."""
    key = turn.tags.content
    content = turn.fields.get(key) if key is not None else None
    if isinstance(content, list):
        return "\n".join(_text_of_part(turn, part) for part in content)
    if content is None and (turn.role == OBSERVATION or (turn.role in RESPONSE_ROLES and _thought(turn))):
        missing = ""
    if content is None and missing is not None:
        return missing
    if not isinstance(content, str):
        turn.refuse(f"{key} is {_kind(content)}, not a text; write it as one")
    return content


def _text_of_part(turn: _Turn, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else None
        turn.refuse(f"{turn.tags.content} has a part of type {str(kind or _kind(part))[:40]}; only texts can be read")
    return text


def _thought(turn: _Turn) -> str:
    """The thought that a turn holds under a key of its own."""
    for key in _THOUGHT_KEYS:
        thought = turn.fields.get(key)
        if thought is not None and not isinstance(thought, str):
            turn.refuse(f"{key} is {_kind(thought)}, not a text; write it as one")
        if thought and thought.strip():
            return thought.strip("\n")
    return ""


def _with_thought(turn: _Turn, text: str) -> str:
    thought = _thought(turn) if turn.role in RESPONSE_ROLES else ""
    if not thought or ("<think>" in text and thought.strip() in text):
        return text
    if "<think>" in text:
        turn.refuse(f"two thoughts, in {turn.tags.content} and in a key of its own; take one out")
    return f"<think>\n{thought}\n</think>\n\n" + text.lstrip("\n")


def _beside(text: str, calls: str) -> str:
    """A function turn: the calls alone, after a thought, or after anything else that is said beside them."""
    if not text or (text.startswith("<think>\n") and text.endswith("\n</think>\n\n")):
        return text + calls
    return f"{text}\n<tool_call>\n{calls}\n</tool_call>"


def _calls(turn: _Turn, plain: bool) -> str:
    """The functions that a turn calls, as JSON; "" where it calls none. `plain`: arguments in a JSON text are read."""
    calls = turn.fields.get("tool_calls")
    if not calls:
        legacy = turn.fields.get("function_call")
        calls = [{"function": legacy}] if legacy else []
    if not calls:
        return ""
    if not isinstance(calls, list):
        turn.refuse(f"tool_calls is {_kind(calls)}, not a list of calls")
    functions = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            turn.refuse("a tool call names no function; each is {'function': {'name': …, 'arguments': …}}")
        arguments = function.get("arguments")
        functions.append({**function, "arguments": _opened(arguments) if plain else arguments})
    return json.dumps(functions, ensure_ascii=False)


def _opened(arguments: Any) -> Any:
    if arguments in _EMPTY:
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        opened = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return opened if isinstance(opened, dict) else arguments


def _unread_of_turn(turn: _Turn, calls_are_read: bool) -> Iterator[str]:
    """The fields of a turn that hold content and are not read."""
    read = {turn.tags.role, turn.tags.content, *_LINKS}
    if turn.role in RESPONSE_ROLES:
        read.update(_THOUGHT_KEYS)
        if calls_are_read:
            read.update(("tool_calls", "function_call"))
    if turn.role == OBSERVATION:
        read.add("name")  # of the function, which the call has named
    for key, value in turn.fields.items():
        if key not in read and value not in _EMPTY:
            yield f"field {key!a} of {turn.role or turn.name} turns"


def _unread_fields(source: Source, record: dict[str, Any]) -> Iterator[str]:
    """The fields of a record that look like content and are not read."""
    read = {*vars(source.columns).values(), *_NOT_CONTENT, *(["functions"] if source.formatting == "messages" else [])}
    for key, value in record.items():
        if key not in read and _looks_like_content(value):
            yield f"column {key!a}"


def _looks_like_content(value: Any) -> bool:
    """Whether a value is more than a label: several words, or a list or object that is not empty."""
    return len(value.split(None, 1)) > 1 if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


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
        _malformed(f"{column} is {_kind(value)}, not a text; write it as one")
    return value


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
