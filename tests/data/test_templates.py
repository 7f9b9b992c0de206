from __future__ import annotations

import datetime
import warnings

import pytest

from dataflex.data.conversations import Conversation, Message
from dataflex.data.template_table import EMPTY_THOUGHT, TEMPLATES
from dataflex.data.templates import Thinking, encode_turns, find_template, prepare_tokenizer, warn_of_foreign_system
from dataflex.errors import UsageError

DAY = datetime.date(2026, 1, 2)
HELLO = Conversation([Message("user", "Hi"), Message("assistant", "Hello")])


@pytest.mark.filterwarnings("ignore:the tokenizer lacks")
def test_llama3_as_text(tokenizer) -> None:
    template = find_template("llama3")
    prepare_tokenizer(tokenizer, template)
    ((prompt, response),) = encode_turns(template, tokenizer, HELLO, Thinking(), DAY)
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt[1:]) == (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(response) == "Hello<|eot_id|>"
    assert response[-1] == tokenizer.eos_token_id


def test_a_default_system_yields_to_the_rows_own(tokenizer) -> None:
    template = find_template("smollm2")
    own = Conversation(HELLO.messages, system="Mine.")
    texts = [tokenizer.decode(encode_turns(template, tokenizer, c, Thinking(), DAY)[0][0]) for c in (HELLO, own)]
    assert "trained by Hugging Face." in texts[0]
    assert texts[1].startswith("<|im_start|>system\nMine.<|im_end|>")


def test_only_the_first_prompt_has_the_system_text(tokenizer) -> None:
    twice = Conversation(HELLO.messages * 2)
    first, second = encode_turns(find_template("qwen"), tokenizer, twice, Thinking(), DAY)
    assert second[0] != first[0]
    assert first[0][-len(second[0]) :] == second[0]


def test_placeholders_in_a_rows_text_stay_as_they_are(tokenizer) -> None:
    text = "{{content}} {{name}}"
    conversation = Conversation([Message("user", text), Message("assistant", text)])
    ((prompt, response),) = encode_turns(find_template("smollm2"), tokenizer, conversation, Thinking(), DAY)
    assert text in tokenizer.decode(prompt)
    assert tokenizer.decode(response).startswith(text)


def test_unknown_template() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'llama3'.*There are alpaca, chatml"):
        find_template("lama3")


def test_a_template_that_fits_adds_nothing(tokenizer) -> None:
    size = len(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("smollm2", "qwen", "chatml"):
            prepare_tokenizer(tokenizer, TEMPLATES[name])
    assert len(tokenizer) == size
    assert tokenizer.eos_token == "<|im_end|>"


def test_tokens_that_are_added_are_told_once(tokenizer) -> None:
    with pytest.warns(UserWarning, match=r"lacks <\|eot_id\|>, <\|eom_id\|>.*ids from 49152 on") as caught:
        prepare_tokenizer(tokenizer, TEMPLATES["llama3"])
        prepare_tokenizer(tokenizer, TEMPLATES["llama3"])
    assert len(caught) == 1
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<|eot_id|>", 49152, "<|im_end|>")


def test_pad_falls_back_to_eos(tokenizer) -> None:
    tokenizer.pad_token = None
    prepare_tokenizer(tokenizer, None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


THOUGHTFUL = Conversation(
    [
        Message("user", "Hi"),
        Message("assistant", "<think>\none\n</think>\n\nHello"),
        Message("user", "And?"),
        Message("assistant", "Bye"),
    ]
)


@pytest.mark.parametrize(
    ("thinking", "prompt_end", "responses"),
    [
        (Thinking(), "", ["<think>\none\n</think>\n\nHello", EMPTY_THOUGHT + "Bye"]),
        (Thinking(None), EMPTY_THOUGHT, ["<think>\none\n</think>\n\nHello", "Bye"]),
        (Thinking(False), EMPTY_THOUGHT, ["Hello", "Bye"]),
        (Thinking(last_only=True), "", ["Hello", EMPTY_THOUGHT + "Bye"]),
    ],
)
def test_thoughts(tokenizer, thinking: Thinking, prompt_end: str, responses: list[str]) -> None:
    turns = encode_turns(find_template("qwen3"), tokenizer, THOUGHTFUL, thinking, DAY)
    assert [tokenizer.decode(response) for _, response in turns] == [text + "<|im_end|>\n" for text in responses]
    assert tokenizer.decode(turns[1][0]).endswith("<|im_start|>assistant\n" + prompt_end)
    plain = encode_turns(find_template("qwen3_nothink"), tokenizer, THOUGHTFUL, thinking, DAY)
    assert tokenizer.decode(plain[1][1]) == "Bye<|im_end|>\n"


def test_every_template_asked_for_is_there() -> None:
    names = "llama3 llama2 qwen qwen3 chatml smollm2 mistral gemma gemma3 phi4 deepseek3 glm4"
    assert {*names.split(), "yi", "vicuna", "alpaca", "default", "empty"} <= set(TEMPLATES)
    assert {name for name, template in TEMPLATES.items() if template.efficient_eos} == {"falcon", "gemma2", "glm4"}


# Templates that SmolLM2's tokenizer has no tokens for: what is lacking and what is split.
MISFITS = {
    "smollm2": (),
    "chatml": (),
    "zephyr": ("splits <|system|>, <|user|>, <|assistant|>",),
    "llama3": ("lacks <|eot_id|>, <|eom_id|>", "splits <|start_header_id|>, <|end_header_id|>"),
    "gemma3": ("lacks <end_of_turn>", "splits <start_of_turn>"),
    "phi4": ("splits <|im_sep|>",),
    "deepseek3": ("splits <｜User｜>, <｜Assistant｜>",),
    "glm4": ("lacks <|user|>, <|observation|>", "splits [gMASK], <sop>, <|system|>, <|assistant|>"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_template_of_another_family_is_told_once(tokenizer, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            prepare_tokenizer(tokenizer, TEMPLATES[name])
    assert len(caught) == bool(MISFITS[name])
    for expected in MISFITS[name]:
        assert expected in str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [("smollm2", False), ("chatml", False), ("alpaca", False), ("vicuna", False), ("qwen", True), ("zephyr", True)],
)
def test_another_familys_system_text_is_told(tokenizer, name: str, foreign: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_foreign_system(name, tokenizer)
    assert [f"template {name!r} opens rows" in str(warning.message) for warning in caught] == [True] * foreign
    tokenizer.chat_template = None  # then nothing says which family it is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_foreign_system(name, tokenizer)
