"""Greedy answers to the prompts of rows, in the words of the template that training used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataflex import processes
from dataflex.data.batches import token_batches
from dataflex.data.chat_formats import end_token
from dataflex.data.encoding import UNSUPERVISED
from dataflex.data.rows import Example, lengths_of
from dataflex.data.templates import find_template
from dataflex.errors import UsageError
from dataflex.gradients.capture import Capture
from dataflex.gradients.probe import LOSS_TOLERANCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_start(example: Example) -> int:
    """The position of the first token of the last answer; a UsageError where no prompt stands before it."""
    start = max(index for index, label in enumerate(example.labels) if label != UNSUPERVISED)
    while start > 0 and example.labels[start - 1] != UNSUPERVISED:
        start -= 1
    if start == 0:
        raise UsageError(
            f"row {example.row} of {example.dataset}: no prompt stands before its answer; set max_new_tokens to 0"
        )
    return start


def prompt_of(example: Example) -> Example:
    """The tokens before the last answer."""
    start = answer_start(example)
    return replace(example, input_ids=example.input_ids[:start], labels=example.labels[:start])


def stop_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos, the end token of training, the template's stop words."""
    table = find_template(template) if template is not None else None
    words = [tokenizer.eos_token, end_token(table, tokenizer), *(table.stop_words if table else ())]
    ids: list[int] = tokenizer.convert_tokens_to_ids([word for word in dict.fromkeys(words) if word])  # type: ignore[assignment] # of a list, a list
    return ids


def until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The tokens before the first one that ends an answer."""
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


def prompt_batches(capture: Capture, prompts: Sequence[Example], new_tokens: int, token_budget: int) -> list[list[int]]:
    """Batches of prompts and their answers within the token budget; of single prompts where padding on the left
    changes the model's numbers. Every process must call this."""
    lengths = lengths_of(prompts)
    if processes.broadcast(_is_changed_by_padding(capture, prompts)):
        return [[index] for index in np.argsort(-lengths, kind="stable").tolist()]
    return token_batches(lengths + new_tokens, token_budget)


def greedy(
    capture: Capture, stops: list[int], new_tokens: int
) -> Callable[[list[Example], torch.Tensor, torch.Tensor], torch.Tensor]:
    """The most likely tokens [rows, new_tokens] int64 after each prompt of a batch, for `forward_rows`; padding after
    the token that ends an answer."""

    def compute(prompts: list[Example], input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens = _generate(capture, prompts, stops, new_tokens).sequences[:, input_ids.shape[1] :]
        return torch.nn.functional.pad(tokens, (0, new_tokens - tokens.shape[1]), value=capture.pad_token_id)

    return compute


def _generate(capture: Capture, prompts: list[Example], stops: list[int], new_tokens: int) -> Any:
    from transformers import GenerationConfig

    # whatever the model's own generation_config.json says, nothing but the likeliest token is taken
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=new_tokens,
        eos_token_id=stops or None,
        pad_token_id=capture.pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=new_tokens == 1,
    )
    longest = max(len(prompt.input_ids) for prompt in prompts)
    missing = [longest - len(prompt.input_ids) for prompt in prompts]
    pairs = list(zip(missing, prompts, strict=True))
    input_ids = torch.tensor([[capture.pad_token_id] * pad + prompt.input_ids for pad, prompt in pairs])
    mask = torch.tensor([[0] * pad + [1] * len(prompt.input_ids) for pad, prompt in pairs])
    model: Any = capture.model
    return model.generate(
        input_ids=input_ids.to(capture.device), attention_mask=mask.to(capture.device), generation_config=how
    )


def _is_changed_by_padding(capture: Capture, prompts: Sequence[Example]) -> bool:
    """Whether the shortest prompt has other logits beside the longest than alone."""
    lengths = lengths_of(prompts)
    pair = [prompts[int(np.argmin(lengths))], prompts[int(np.argmax(lengths))]]
    with capture.running(), torch.no_grad():
        alone, beside = (_generate(capture, rows, [], 1).logits[0][0].float() for rows in (pair[:1], pair))
    return bool((alone - beside).norm() > LOSS_TOLERANCE[capture.dtype] * alone.norm())
