from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dataflex.data.catalog import DIRECT_LAYOUTS
from dataflex.data.conversations import Conversation, Message, Unusable, to_conversation
from dataflex.data.records import Columns, Source

FORMATS = {
    key: Source(key, Path("x.json"), formatting, columns, tags)
    for key, (formatting, columns, tags) in DIRECT_LAYOUTS.items()
}
ALPACA, SHAREGPT, MESSAGES = FORMATS["instruction"], FORMATS["conversations"], FORMATS["messages"]


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


def roles(conversation: Conversation) -> list[str]:
    return [message.role for message in conversation.messages]


@pytest.mark.parametrize(
    ("instruction", "given", "text"),
    [("a", "b", "a\nb"), ("a", "", "a"), ("", "b", "b"), ("a", None, "a"), (None, None, "")],
)
def test_alpaca_joins_what_is_there(instruction: str | None, given: str | None, text: str) -> None:
    conversation = to_conversation(ALPACA, {"instruction": instruction, "input": given, "output": "c"})
    assert conversation == Conversation([Message("user", text), Message("assistant", "c")])


def test_alpaca_history_comes_first() -> None:
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    conversation = to_conversation(ALPACA, record)
    assert [message.content for message in conversation.messages] == ["a", "b", "c", "d"]
    assert conversation.system == "s"


def test_columns_left_out_are_not_read() -> None:
    source = Source("a", Path("x"), columns=Columns(query=None))
    conversation = to_conversation(source, {"instruction": "a", "input": "b", "output": "c", "system": "s"})
    assert conversation.messages[0].content == "a"
    assert conversation.system == ""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (None, r"^no response$"),
        (3, "output is int, not a text; write it as one"),
        (1.5, "output is float, not a text"),
        (True, "output is bool, not a text"),
        (["x"], "output is list, not a text"),
        ({"a": 1}, "output is dict, not a text"),
        (b"x", "output is bytes, not a text"),
    ],
)
def test_an_output_that_is_no_text_is_named_by_its_type(output: object, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        to_conversation(ALPACA, {"instruction": "a", "output": output})


def test_an_empty_output_is_kept_as_llamafactory_does() -> None:
    assert to_conversation(ALPACA, {"instruction": "a", "output": ""}).messages[-1] == Message("assistant", "")


def test_sharegpt_system_turn_overrides_the_column() -> None:
    both = turns(("human", "a"), ("gpt", "b"))
    assert to_conversation(SHAREGPT, {"conversations": both, "system": "column"}).system == "column"
    first = turns(("system", "turn")) + both
    assert to_conversation(SHAREGPT, {"conversations": first, "system": "column"}).system == "turn"


def test_sharegpt_tools_may_be_a_list() -> None:
    record = {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": [{"name": "ü"}]}
    assert to_conversation(SHAREGPT, record).tools == '[{"name": "ü"}]'


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([("human", "a")], "no response"),
        ([], "no response"),
        ([("system", "a")], "no response"),
        ([("human", "a"), ("gpt", "b"), ("observation", "c")], "no response"),
        ([("gpt", "a"), ("human", "b")], "roles do not alternate"),
        ([("human", "a"), ("human", "b")], "roles do not alternate"),
        ([("human", "a"), ("narrator", "b")], "roles do not alternate"),
    ],
)
def test_sharegpt_rows_that_are_dropped(pairs: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        to_conversation(SHAREGPT, {"conversations": turns(*pairs)})


def test_messages_with_tools() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "b"},
        ]
    }
    conversation = to_conversation(MESSAGES, record)
    assert roles(conversation) == ["user", "function", "observation", "assistant"]
    assert conversation.messages[1].content == '[{"name": "f", "arguments": {"x": 1}}]'
    assert conversation.messages[2].content == "1\n</tool_response>\n<tool_response>\n2"
    assert conversation.system == ""  # LLaMA-Factory's addition is for its `openai` entries alone


WEIRD = [None, 0, 1.5, True, "", "text", [], [[]], [None], [1], ["a"], {}, {"a": 1}, [{}], [{"role": 1}]]
WEIRD += [[{"role": "user", "content": None}], [{"from": "human", "value": ["x"]}], [["a", None]], [["a"]], "\ud800"]
WEIRD += [[{"role": "assistant", "content": "", "tool_calls": calls}] for calls in (1, [1], [{}], [{"function": 1}])]


@pytest.mark.parametrize("source", FORMATS.values(), ids=list(FORMATS))
def test_weird_records_give_a_reason_never_another_error(source: Source) -> None:
    keys = [key for key in vars(source.columns).values() if key]
    good = {"instruction": "a", "output": "b"}
    records = [{key: value} for key in keys for value in WEIRD]
    records += [{**good, key: value} for key in keys for value in WEIRD]
    records += [{a: v, b: w} for a, b in itertools.permutations(keys, 2) for v in WEIRD[:6] for w in WEIRD]
    for record in [{}, *records]:
        try:
            conversation = to_conversation(source, record)
        except Unusable as reason:
            assert 0 < len(str(reason)) < 160
        else:
            assert len(conversation.messages) % 2 == 0
            assert all(isinstance(message.content, str) for message in conversation.messages)
