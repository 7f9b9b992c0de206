"""`projector: sketch`"""

from __future__ import annotations

from typing import Self

import torch

from dataflex.projection.counter_hash import counter_hash
from dataflex.projection.protocol import NamedProjector

# Where starting a kernel costs more than its work over one block of a sketch, whole blocks are added together.
SLOW_TO_START = {"cuda"}
FEWEST_BLOCKS = 4
MAX_FLOATS = 1 << 26  # gathered at a time: 256 MiB of float32
SIGNS_AT_ONCE = 1 << 20  # a sign is one byte, its hash takes int64 while it is made


class Sketch(NamedProjector):
    """Sign-flipped, cyclically shifted fold: parameter j goes to bucket (j + shift[j ÷ k]) mod k with a random sign.

    An inner product of two sketches is unbiased, with variance at most (‖x‖²‖y‖² + ⟨x,y⟩²)/k (the
    count-sketch bound of Charikar, Chen & Farach-Colton 2002; two parameters of one block never
    collide, of different blocks with probability 1/k). Costs one multiplication and one addition
    per parameter, and one byte of memory per parameter for the signs.
    """

    def __init__(self, parameters: int, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.signs = torch.empty(parameters, dtype=torch.int8, device=device)
        for start in range(0, parameters, SIGNS_AT_ONCE):
            counters = torch.arange(start, min(start + SIGNS_AT_ONCE, parameters), device=device)
            self.signs[start : start + SIGNS_AT_ONCE] = 1 - 2 * (counter_hash(seed, 0, counters) & 1)
        blocks = torch.arange(-(-parameters // dim), device=device)
        self.shift = counter_hash(seed, 1, blocks) * dim >> 32
        self.shifts: list[int] = self.shift.tolist()

    @classmethod
    def make(cls, parameters: int, dim: int, seed: int, device: torch.device) -> Self:
        return cls(parameters, dim, seed, device)

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        values.mul_(self.signs[offset : offset + values.shape[1]])
        start, end = offset, offset + values.shape[1]
        first, last = -(-start // self.dim), end // self.dim
        if out.device.type in SLOW_TO_START and last - first >= FEWEST_BLOCKS:
            inside = slice(first * self.dim - start, last * self.dim - start)
            self._add_slices(out, start, values[:, : inside.start])
            self._add_blocks(out, first, values[:, inside])
            self._add_slices(out, last * self.dim, values[:, inside.stop :])
        else:
            self._add_slices(out, start, values)

    def _add_slices(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        """Add signed `values` [rows, n], one slice for each block and each wrap round the buckets."""
        start, end = offset, offset + values.shape[1]
        while start < end:
            block, index = divmod(start, self.dim)
            bucket = (index + self.shifts[block]) % self.dim
            length = min(end - start, self.dim - index, self.dim - bucket)
            out[:, bucket : bucket + length].add_(values[:, start - offset : start - offset + length])
            start += length

    def _add_blocks(self, out: torch.Tensor, first: int, values: torch.Tensor) -> None:
        """Add signed `values` [rows, blocks × k], whole blocks from number `first` on, in a few large steps."""
        blocks = values.unflatten(1, (-1, self.dim))
        at_once = max(1, MAX_FLOATS // (max(16, len(values)) * self.dim))  # the buckets' indices take memory too
        bucket = torch.arange(self.dim, device=out.device)
        for start in range(0, blocks.shape[1], at_once):
            part = blocks[:, start : start + at_once]
            shift = self.shift[first + start : first + start + part.shape[1], None]
            out += part.gather(2, ((bucket - shift) % self.dim).expand_as(part)).sum(dim=1)
