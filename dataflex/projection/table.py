"""The projectors that the key `projector` can name. Reading the table imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataflex.errors import UsageError
from dataflex.named import Named, suggestion

if TYPE_CHECKING:
    import torch

    from dataflex.projection.protocol import NamedProjector


@dataclass(frozen=True)
class ProjectorEntry(Named):
    """A projector of the table."""

    needs_dim: bool = True
    """Whether proj_dim decides k."""


PROJECTORS = {
    "sketch": ProjectorEntry("dataflex.projection.sketch:Sketch", "sparse, one pass over the gradient"),
    "rademacher": ProjectorEntry("dataflex.projection.rademacher:Rademacher", "dense random signs, slow on a CPU"),
    "fast_jl": ProjectorEntry(
        "dataflex.projection.fast_jl:FastJl", "dense random signs on CUDA, by the package of that name"
    ),
    "none": ProjectorEntry("dataflex.projection.identity:Identity", "keep the full gradient", needs_dim=False),
}


def check_name(name: str) -> str:
    """`name`, if the table has it.

    Raises:
        UsageError: naming the projectors there are.
    """
    if name not in PROJECTORS:
        raise UsageError(f"no projector {name!r}; there are {', '.join(PROJECTORS)}{suggestion(name, PROJECTORS)}")
    return name


def projector_class(name: str) -> type[NamedProjector]:
    """The class behind `name`; UsageError as `check_name`."""
    found: type[NamedProjector] = PROJECTORS[check_name(name)].load()
    return found


def check_projector(name: str, dim: int, device: torch.device) -> None:
    """Raise a UsageError where the projector `name` cannot run on `device` or with proj_dim `dim`."""
    projector_class(name).check(dim, device)


def make_projector(name: str, parameters: int, dim: int, seed: int, device: torch.device | str) -> NamedProjector:
    """The projector `name` of `parameters` parameters on `device`; UsageError as `check_projector`."""
    import torch

    device = torch.device(device)
    check_projector(name, dim, device)
    return projector_class(name).make(parameters, dim, seed, device)
