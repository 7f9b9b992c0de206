"""Inner products in place of a projection, for exact scores."""

from __future__ import annotations

import torch


class Queries:
    """Inner products with q given vectors [q, P] in full parameter space, plus ‖·‖² as the last column: k = q + 1."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors
        self.dim = vectors.shape[0] + 1

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        out[:, :-1].addmm_(values, self.vectors[:, offset : offset + values.shape[1]].T)
        out[:, -1].add_((values * values).sum(dim=1))
