"""From encoded turns to one row of token ids and labels, truncated by LLaMA-Factory's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dataflex.data.templates import Turn

UNSUPERVISED = -100  # cross-entropy leaves these labels out


class Encoded(NamedTuple):
    """A row: `labels` are `input_ids` where supervised, else -100. `lost_end`: its last response was cut.

    `lost` and `left_out` say in a phrase each what the conversation has and the turns, before any cut, have not.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    lost_end: bool
    lost: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def encode_row(
    turns: Sequence[Turn],
    cutoff_len: int,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    efficient_eos: int | None = None,
) -> Encoded:
    """Join (prompt, response) turns into at most `cutoff_len` tokens.

    Args:
        turns: token ids of each prompt and response, first to last.
        cutoff_len: tokens a row may have; turns that no longer fit are left out.
        train_on_prompt: supervise prompts too.
        mask_history: supervise the last response alone, and keep late turns rather than early ones.
        efficient_eos: id that ends the row, and is the label where each later prompt begins, for templates
            whose turns end without a token.
    """
    pieces: list[tuple[list[int], list[int]]] = []  # (ids, labels), in the order in which turns are fitted
    total = 0 if efficient_eos is None else 1
    truncated = lost_end = False
    last = 0 if mask_history else len(turns) - 1
    fitted = reversed(turns) if mask_history else turns
    for index, (prompt, response) in enumerate(fitted):
        if total >= cutoff_len:
            truncated = True
            lost_end = lost_end or index <= last
            break
        prompt_len, response_len = fit_turn(len(prompt), len(response), cutoff_len - total)
        total += prompt_len + response_len
        truncated = truncated or prompt_len < len(prompt) or response_len < len(response)
        lost_end = lost_end or (index == last and response_len < len(response))
        prompt, response = prompt[:prompt_len], response[:response_len]

        prompt_labels = list(prompt) if train_on_prompt else [UNSUPERVISED] * prompt_len
        if efficient_eos is not None and index > 0 and prompt_len and not train_on_prompt:
            prompt_labels[0] = efficient_eos
        is_history = mask_history and index > 0
        response_labels = [UNSUPERVISED] * response_len if is_history else list(response)
        pieces.append((prompt + response, prompt_labels + response_labels))

    if mask_history:
        pieces.reverse()
    input_ids = [token for ids, _ in pieces for token in ids]
    labels = [label for _, piece in pieces for label in piece]
    if efficient_eos is not None:
        input_ids.append(efficient_eos)
        labels.append(efficient_eos)
    return Encoded(input_ids, labels, truncated, lost_end)


def fit_turn(prompt_len: int, response_len: int, room: int) -> tuple[int, int]:
    """Tokens of prompt and of response that are kept where `room` tokens are left.

    A response shorter than half the room stays whole and the prompt gives way; else a prompt that short
    stays whole; else both shrink in proportion.
    """
    if 2 * response_len < room:
        response_room = room
    elif 2 * prompt_len < room:
        response_room = room - prompt_len
    else:
        response_room = int(room * (response_len / (prompt_len + response_len)))
    response_kept = min(response_len, response_room)
    return min(prompt_len, room - response_kept), response_kept
