"""How a template words tools and calls of tools: one format for each family of models."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataflex.data.conversations import Unusable

NO_REMARKS = "the template cannot say the text beside a function call; take the text out, or choose another template"

_DEFAULT_PROMPT = (
    "You have access to the following tools:\n{tools}"
    "Use the following format if using a tool:\n"
    "```\n"
    "Action: tool name (one of [{names}])\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{{"input": "hello world", "num_beams": 5}}```)\n'
    "```\n"
)
_LLAMA3_PROMPT = (
    "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    "You have access to the following functions. To call a function, please respond with JSON for a function call. "
    'Respond in the format {{"name": function name, "parameters": dictionary of argument name and its value}}. '
    "Do not use variables.\n\n{tools}"
)
_GLM4_PROMPT = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{tools}"
)
_QWEN_PROMPT = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}"
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{{"name": <function-name>, '
    '"arguments": <args-json-object>}}\n</tool_call>'
)

# A function turn may say something before its call: a thought, or anything around a tagged call.
THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n\n", re.DOTALL)
_TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One function called, with its arguments (JSON values, as a rule an object)."""

    name: str
    arguments: Any


def tool_prompt(tool_format: str, tools: str, day: datetime.date) -> str:
    """The part of the system turn that presents `tools`, a JSON list; empty for an empty list.

    Args:
        day: the date that llama3's prompt tells.

    Raises:
        Unusable: `tools` is not JSON, or not functions with the parts this format names.
    """
    functions = parse_tools(tools)
    try:
        return TOOL_FORMATS[tool_format].prompt(functions, day) if functions else ""
    except KeyError as error:
        raise Unusable(f"malformed tools (a function has no {error.args[0]}); give each a name") from None
    except (TypeError, AttributeError):
        raise Unusable("malformed tools (parameters are not a JSON schema); write them as one") from None


def function_text(tool_format: str, content: str, with_remarks: bool) -> str:
    """A function turn as its model writes it. `with_remarks`: keep a thought or text around a tagged call.

    Raises:
        Unusable: `content` is not JSON with `name` and `arguments`, or has a text that is not to be kept.
    """
    before, calls = split_remarks(content)
    if before and not with_remarks:
        raise Unusable(NO_REMARKS)
    return before + TOOL_FORMATS[tool_format].calls(parse_calls(calls))


def parse_tools(tools: str) -> list[dict[str, Any]]:
    """The functions on offer, from JSON text."""
    functions = _json(tools, "tools")
    if not isinstance(functions, list) or not all(isinstance(function, dict) for function in functions):
        raise Unusable("malformed tools (not a list of functions); write them as one")
    return functions


def split_remarks(content: str) -> tuple[str, str]:
    """A function turn as (text beside the call, JSON of the call)."""
    if tagged := _TAGGED_CALL.search(content):
        return content.replace(tagged.group(0), ""), tagged.group(1)
    if thought := THOUGHT.search(content):
        return thought.group(0), content.replace(thought.group(0), "")
    return "", content


def parse_calls(text: str) -> list[Call]:
    """The calls in JSON text: an object or a list of them."""
    calls = _json(text, "function call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        raise Unusable("malformed function call (no name or no arguments); give it both")
    return [Call(call["name"], call["arguments"]) for call in calls]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable(f"malformed {what} (not JSON); write it as JSON") from None


def _dumps(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def _bare(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"] if tool.get("type") == "function" else tool


def _default_prompt(tools: list[dict[str, Any]], day: datetime.date) -> str:
    functions = [_bare(tool) for tool in tools]
    names = ", ".join(function["name"] for function in functions)
    return _DEFAULT_PROMPT.format(tools="".join(map(_described, functions)), names=names)


def _described(function: dict[str, Any]) -> str:
    parameters = function.get("parameters") or {}  # none, for a function without arguments
    required = parameters.get("required") or []
    arguments = ""
    for name, schema in (parameters.get("properties") or {}).items():
        marks = ", required" if name in required else ""
        choices = ", should be one of [{}]".format(", ".join(schema["enum"])) if schema.get("enum") else ""
        items = f", where each item should be {schema['items'].get('type', '')}" if schema.get("items") else ""
        kind, text = schema.get("type", ""), schema.get("description", "")
        arguments += f"  - {name} ({kind}{marks}): {text}{choices}{items}\n"
    description = function.get("description", "")
    return f"> Tool Name: {function['name']}\nTool Description: {description}\nTool Args:\n{arguments}\n"


def _default_calls(calls: list[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {_dumps(call.arguments)}" for call in calls)


def _glm4_prompt(tools: list[dict[str, Any]], day: datetime.date) -> str:
    texts = [
        f"\n\n## {tool['name']}\n\n{_dumps(tool, indent=4)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in map(_bare, tools)
    ]
    return _GLM4_PROMPT.format(tools="".join(texts))


def _glm4_calls(calls: list[Call]) -> str:
    if len(calls) != 1:
        raise Unusable("glm4 words one function call a turn; set another template")
    return f"{calls[0].name}\n{_dumps(calls[0].arguments)}"


def _qwen_prompt(tools: list[dict[str, Any]], day: datetime.date) -> str:
    return _QWEN_PROMPT.format(tools="".join("\n" + _dumps(_wrapped(tool)) for tool in tools))


def _qwen_calls(calls: list[Call]) -> str:
    texts = [_dumps({"name": call.name, "arguments": call.arguments}) for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def _llama3_prompt(tools: list[dict[str, Any]], day: datetime.date) -> str:
    texts = "".join(_dumps(_wrapped(tool), indent=4) + "\n\n" for tool in tools)
    return _LLAMA3_PROMPT.format(date=day.strftime("%d %b %Y"), tools=texts)


def _llama3_calls(calls: list[Call]) -> str:
    objects = [{"name": call.name, "parameters": call.arguments} for call in calls]
    return _dumps(objects[0] if len(objects) == 1 else objects)


def _mistral_prompt(tools: list[dict[str, Any]], day: datetime.date) -> str:
    return f"[AVAILABLE_TOOLS] {_dumps([_wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def _mistral_calls(calls: list[Call]) -> str:
    return _dumps([{"name": call.name, "arguments": call.arguments} for call in calls])


@dataclass(frozen=True)
class ToolFormat:
    """The format in which a family of models reads tools and writes calls."""

    prompt: Callable[[list[dict[str, Any]], datetime.date], str]
    calls: Callable[[list[Call]], str]


TOOL_FORMATS = {
    "default": ToolFormat(_default_prompt, _default_calls),
    "glm4": ToolFormat(_glm4_prompt, _glm4_calls),
    "llama3": ToolFormat(_llama3_prompt, _llama3_calls),
    "mistral": ToolFormat(_mistral_prompt, _mistral_calls),
    "qwen": ToolFormat(_qwen_prompt, _qwen_calls),
}
