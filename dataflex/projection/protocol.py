"""What a gradient pass asks of a projector, and what the table asks of one beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, Self

import torch


class Projector(Protocol):
    """A linear map P → k that is fed one slice of the parameters at a time."""

    dim: int
    """k, the width of a projected row."""

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        """Add the image of `values` [rows, n], which stand at parameters offset … offset+n, to `out` [rows, k].

        May overwrite `values`.
        """


class NamedProjector(ABC):
    """A Projector that the key `projector` can name."""

    dim: int

    @abstractmethod
    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        """As `Projector.add`."""

    @classmethod
    @abstractmethod
    def make(cls, parameters: int, dim: int, seed: int, device: torch.device) -> Self:
        """The map of P = `parameters` numbers on `device`; `dim` and `seed` are the keys proj_dim and proj_seed."""

    @classmethod
    def check(cls, dim: int, device: torch.device) -> None:
        """Raise a UsageError where the projector cannot run on `device` or with proj_dim `dim`. Most run everywhere."""
        return None

    @classmethod
    def width(cls, parameters: int, dim: int) -> int:
        """k, for `parameters` parameters and proj_dim `dim`."""
        return dim

    @classmethod
    def manifest_device(cls) -> str | None:
        """`projector_device` in a store's manifest: the device whose kernels decide the signs. None where the seed and
        the index alone decide them."""
        return None
