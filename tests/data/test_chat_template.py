from __future__ import annotations

import datetime
import json

import pytest

from dataflex.data.chat_template import check_chat_template, encode_chat_turns
from dataflex.data.conversations import Conversation, Message, Unusable
from dataflex.errors import UsageError

DAY = datetime.date(2026, 1, 2)
CHAT = Conversation(
    [Message("user", "a"), Message("assistant", " b "), Message("user", "c"), Message("assistant", "d")]
)

# Words the last response otherwise than earlier ones, and opens a thought in the generation prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NATIVE_TOOLS = (
    "{% if tools %}TOOLS {{ tools | length }}\n{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
FORGETS = "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"


def texts(tokenizer, conversation: Conversation) -> list[tuple[str, str]]:
    turns = encode_chat_turns(tokenizer, conversation, True, DAY)
    return [(tokenizer.decode(prompt), tokenizer.decode(response)) for prompt, response in turns]


def test_responses_and_their_end_are_told_from_prompts(tokenizer) -> None:
    first, second = texts(tokenizer, CHAT)
    assert first[0].endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert first[1] == " b <|im_end|>\n"
    assert second == ("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", "d<|im_end|>\n")


def test_a_template_that_words_the_last_turn_otherwise(tokenizer) -> None:
    tokenizer.chat_template = THINKING
    first, second = texts(tokenizer, CHAT)
    assert first == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>\n")
    assert "".join(second).endswith("assistant\n<think>\n\n</think>\n\nd<|im_end|>\n")
    assert second[1].endswith("d<|im_end|>\n")


def test_thinking_turned_off_is_told_to_the_template(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '()' if m.role == 'assistant' and enable_thinking is false }}"
        "{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '()' if enable_thinking is false }}{% endif %}"
    )
    for setting, opening in ((False, "[assistant]()"), (True, "[assistant]"), (None, "[assistant]")):
        turns = encode_chat_turns(tokenizer, CHAT, setting, DAY)
        assert [tokenizer.decode(response) for _, response in turns] == [" b .", "d."]
        assert tokenizer.decode(turns[0][0]) == "[user]a." + opening


def test_tools_in_a_template_that_knows_them(tokenizer) -> None:
    tokenizer.chat_template = NATIVE_TOOLS
    call = json.dumps({"name": "f", "arguments": {}})
    messages = [Message("user", "a"), Message("function", call), Message("observation", "1"), Message("assistant", "b")]
    assert texts(tokenizer, Conversation(messages, tools='[{"name": "f"}]')) == [
        ("TOOLS 1\n[user]a<|im_end|>[assistant]", "CALL f<|im_end|>"),
        ("[tool]1<|im_end|>[assistant]", "b<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("template", "reason"), [(REFUSES_SYSTEM, "refused by the chat template .no system"), (FORGETS, "rewritten by")]
)
def test_conversations_a_template_cannot_word(tokenizer, template: str, reason: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(Unusable, match=reason):
        encode_chat_turns(tokenizer, Conversation(CHAT.messages, system="s"), True, DAY)


def test_no_chat_template(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="set `template`"):
        check_chat_template(tokenizer)
