"""A saved tokenizer stops where training taught the model to stop: the oracle is what training supervises."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from dataflex.data.chat_formats import end_token, ollama_modelfile, read_template
from dataflex.data.chat_template import encode_chat_turns
from dataflex.data.chat_tokenizer import set_chat
from dataflex.data.conversations import Conversation, Message
from dataflex.data.encoding import encode_row
from dataflex.data.template_table import TEMPLATES
from dataflex.data.templates import Thinking, encode_turns, prepare_tokenizer

DAY = datetime.date(2026, 1, 1)
HELLO = Conversation([Message("user", "Hi"), Message("assistant", "Hello")])

PROMPT = "{% if add_generation_prompt %}assistant\n{% endif %}"
OWN = {
    "eos": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "another token": "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
    "another token, and eos before it all": (
        "{{ eos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "no system turn": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    ),
    "no token": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


def first_special(tokenizer: Any, ids: list[int]) -> str | None:
    """Of a supervised response to `HELLO`: the first special token after the content."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return next((token for token in tokens if token in tokenizer.all_special_tokens or token.startswith("<|")), None)


@pytest.mark.filterwarnings("ignore:the tokenizer")
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_of_the_table(tokenizer: Any, name: str) -> None:
    template = TEMPLATES[name]
    prepare_tokenizer(tokenizer, template)
    turns = encode_turns(template, tokenizer, HELLO, Thinking(None), DAY)
    eos = tokenizer.eos_token_id if template.efficient_eos else None
    labels = [label for label in encode_row(turns, 99, efficient_eos=eos).labels if label >= 0]
    expected = first_special(tokenizer, labels)
    assert end_token(template, tokenizer) == expected
    set_chat(tokenizer, name)
    assert expected is None or tokenizer.eos_token == expected
    assert expected is None or f'PARAMETER stop "{expected}"' in ollama_modelfile(template, tokenizer)
    assert tokenizer.chat_template


@pytest.mark.parametrize("name", OWN)
def test_the_tokenizers_own_template(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template, tokenizer.eos_token = OWN[name], "<|endoftext|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    before = tokenizer.apply_chat_template(messages, tokenize=False)
    [(_, response)] = encode_chat_turns(tokenizer, HELLO, None, DAY)
    expected = first_special(tokenizer, response)
    assert (expected is None) == (name == "no token")
    assert set_chat(tokenizer, None) == read_template(tokenizer)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == before
    assert end_token(None, tokenizer) == expected
    assert expected is None or f'PARAMETER stop "{expected}"' in ollama_modelfile(read_template(tokenizer), tokenizer)
    words_eos = "eos_token" in OWN[name] or expected is None
    assert tokenizer.eos_token == ("<|endoftext|>" if words_eos else expected)
