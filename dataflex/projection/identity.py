"""`projector: none`"""

from __future__ import annotations

from typing import Self

import torch

from dataflex.projection.protocol import NamedProjector


class Identity(NamedProjector):
    """No projection: k = P. Exact, and as large as the adapter for every row."""

    def __init__(self, parameters: int) -> None:
        self.dim = parameters

    @classmethod
    def make(cls, parameters: int, dim: int, seed: int, device: torch.device) -> Self:
        return cls(parameters)

    @classmethod
    def width(cls, parameters: int, dim: int) -> int:
        return parameters

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        out[:, offset : offset + values.shape[1]] = values
