"""The tokenizer that goes with a trained model: its chat template and its end token are those of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex.data.chat_formats import answered, end_token, jinja_template, read_template
from dataflex.data.template_table import REPLACING, Template
from dataflex.data.templates import find_template, prepare_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def set_chat(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Template | None:
    """Give the tokenizer what a model trained with template `name` needs to chat: special tokens, the wording, the
    end token. None is the tokenizer's own template.

    Returns:
        the template, as far as it could be told from the tokenizer.
    """
    template = find_template(name) if name is not None else None
    prepare_tokenizer(tokenizer, template)
    if template is not None and (not tokenizer.chat_template or name in REPLACING):
        tokenizer.chat_template = jinja_template(template, tokenizer)
    end = end_token(template, tokenizer)
    if end is not None and end != tokenizer.eos_token:
        _stop_at(tokenizer, end)
    if template is None and tokenizer.chat_template:
        return read_template(tokenizer)
    return template


def _stop_at(tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    """Make `end` the tokenizer's eos, unless its chat template then words things otherwise."""
    before, eos = answered(tokenizer), tokenizer.eos_token
    tokenizer.eos_token = end
    if answered(tokenizer) != before:
        tokenizer.eos_token = eos
