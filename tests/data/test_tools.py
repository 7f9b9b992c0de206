from __future__ import annotations

import datetime
import json

import pytest

from dataflex.data.conversations import Unusable
from dataflex.data.tools import TOOL_FORMATS, function_text, tool_prompt

DAY = datetime.date(2026, 1, 2)
CLOCK = {"name": "clock", "description": "The time.", "parameters": {"properties": {"zone": {"type": "string"}}}}
CALL = '{"name": "clock", "arguments": {"zone": "Köln"}}'


def test_calls_in_each_format() -> None:
    texts = {name: function_text(name, CALL, with_remarks=True) for name in TOOL_FORMATS}
    assert texts == {
        "default": 'Action: clock\nAction Input: {"zone": "Köln"}',
        "glm4": 'clock\n{"zone": "Köln"}',
        "llama3": '{"name": "clock", "parameters": {"zone": "Köln"}}',
        "mistral": '[{"name": "clock", "arguments": {"zone": "Köln"}}]',
        "qwen": '<tool_call>\n{"name": "clock", "arguments": {"zone": "Köln"}}\n</tool_call>',
    }


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_prompts_name_the_tool_and_an_empty_list_says_nothing(name: str) -> None:
    assert "clock" in tool_prompt(name, json.dumps([CLOCK]), DAY)
    assert tool_prompt(name, json.dumps([{"type": "function", "function": CLOCK}]), DAY) == tool_prompt(
        name, json.dumps([CLOCK]), DAY
    )
    assert tool_prompt(name, "[]", DAY) == ""


def test_a_thought_stays_before_the_call() -> None:
    assert function_text("llama3", "<think>\nhm\n</think>\n\n" + CALL, with_remarks=True).startswith("<think>\nhm")


@pytest.mark.parametrize("calls", [f"[{CALL}, {CALL}]", "[]"])
def test_glm4_words_one_call(calls: str) -> None:
    with pytest.raises(Unusable, match="one function call"):
        function_text("glm4", calls, with_remarks=True)


@pytest.mark.parametrize("tools", ["not json", '{"name": "x"}', "[1]", "3", '[{"parameters": 1}]'])
def test_malformed_tools_are_a_reason(tools: str) -> None:
    with pytest.raises(Unusable, match="malformed tools"):
        tool_prompt("default", tools, DAY)


@pytest.mark.parametrize("tool", [{"name": "ring"}, {"name": "ring", "parameters": None}])
def test_a_function_may_have_no_parameters(tool: dict) -> None:
    assert "> Tool Name: ring\nTool Description: \nTool Args:\n\n" in tool_prompt("default", json.dumps([tool]), DAY)


def test_a_text_beside_a_call_stays_or_is_a_reason() -> None:
    beside = f"I will look.\n<tool_call>\n{CALL}\n</tool_call>"
    assert function_text("qwen", beside, with_remarks=True) == "I will look.\n" + function_text("qwen", CALL, True)
    with pytest.raises(Unusable, match="cannot say the text beside a function call; take the text out"):
        function_text("qwen", beside, with_remarks=False)


@pytest.mark.parametrize("call", ["", "text", "1", "[1]", '{"name": "x"}', '{"name": 1, "arguments": {}}'])
def test_malformed_calls_are_a_reason(call: str) -> None:
    with pytest.raises(Unusable, match="malformed function call"):
        function_text("qwen", call, with_remarks=True)
