"""Rows of random tokens, for the tiny model's vocabulary."""

from __future__ import annotations

import torch

from dataflex.data.examples import Example


def row(number: int, length: int, supervised: list[int]) -> Example:
    """A row of `length` tokens of which those at `supervised` are learned from."""
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(3, 2000, (length,), generator=generator).tolist()
    return Example(number, ids, [ids[i] if i in supervised else -100 for i in range(length)], None, "made")
