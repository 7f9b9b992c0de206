"""Batches by a token budget, and rows padded into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dataflex.data.encoding import UNSUPERVISED

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    from dataflex.data.examples import Example


def token_batches(lengths: ArrayLike, token_budget: int) -> list[list[int]]:
    """Cut rows into batches of at most `token_budget` tokens, padding included.

    Rows are taken longest first, ties by index, so a batch's first row is its longest and what does not
    fit in memory shows at once. A row longer than the budget is a batch of its own. The cut is a function
    of the arguments alone: a resumed run computes the same batches.

    Args:
        lengths: [N] tokens of each row.
        token_budget: rows × longest row that a batch may have.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-tokens, kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, token_budget // max(1, int(tokens[order[start]])))
        batches.append(order[start:stop].tolist())
        start = stop
    return batches


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Examples as right-padded int64 tensors [rows, longest]: input_ids, attention_mask, labels (-100)."""
    import torch

    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], UNSUPERVISED),
    }
