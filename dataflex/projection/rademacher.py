"""`projector: rademacher`"""

from __future__ import annotations

from typing import Self

import torch

from dataflex.projection.counter_hash import counter_hash
from dataflex.projection.protocol import NamedProjector

# Of the matrix at a time, by device: 8 MiB of float32 stay near a processor's cache, 128 MiB keep a GPU busy.
MAX_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 25}


class Rademacher(NamedProjector):
    """Dense random signs over √k: the projection LESS uses, exact in expectation with variance about ‖x‖²‖y‖²/k.

    Costs rows × n × k multiplications, and n × k hashed bits a batch whatever its rows. The matrix exists only in
    small pieces.
    """

    def __init__(self, parameters: int, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.seed = seed
        self.words = -(-dim // 32)  # one hash gives 32 signs
        self.chunk = max(1, MAX_FLOATS[torch.device(device).type] // dim)
        self.bits = torch.arange(8, dtype=torch.uint8, device=device)

    @classmethod
    def make(cls, parameters: int, dim: int, seed: int, device: torch.device) -> Self:
        return cls(parameters, dim, seed, device)

    def matrix(self, start: int, length: int) -> torch.Tensor:
        """Rows start … start+length of the matrix: [length, k] float32 of ±1/√k."""
        parameter = torch.arange(start, start + length, device=self.bits.device)[:, None]
        word = torch.arange(self.words, device=self.bits.device)[None, :]
        words = counter_hash(self.seed, 2, parameter * self.words + word)
        octets = words.view(torch.uint8).view(length, self.words, 8)[:, :, :4]  # a byte a sign while they are split
        bits = (octets.reshape(length, -1, 1) >> self.bits) & 1
        sign = self.dim**-0.5
        return bits.view(length, -1)[:, : self.dim].to(torch.float32).mul_(-2 * sign).add_(sign)

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        for start in range(0, values.shape[1], self.chunk):
            piece = values[:, start : start + self.chunk]
            out.addmm_(piece, self.matrix(offset + start, piece.shape[1]))
