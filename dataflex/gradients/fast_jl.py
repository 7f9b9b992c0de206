"""The dense ±1 projection of the `fast_jl` package, LESS's and TRAK's own kernel, on CUDA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.projection import counter_hash

MOST_COLUMNS = 1 << 25  # the kernel counts the numbers of a call, 32 rows of them, in 32 bits
DIM_MULTIPLE = 512


class FastJl:
    """Dense random signs over √k, made inside the kernel: unbiased, with variance about ‖x‖²‖y‖²/k.

    Costs rows × n × k multiplications, and no memory for the signs. They depend on the number of the GPU's
    multiprocessors and on how the parameters are cut, so only stores made on one kind of GPU can be compared; `sketch`
    and `rademacher` are the same everywhere.

    The first rows are looked at: a kernel built for another GPU gives zeros, or nonsense, without an error.

    Args:
        package: the module `fast_jl`.
        multiprocessors: of the GPU.
    """

    def __init__(self, package: Any, dim: int, seed: int, multiprocessors: int) -> None:
        self.package = package
        self.dim = dim
        self.seed = seed
        self.multiprocessors = multiprocessors
        self.checked = False

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        for start in range(0, values.shape[1], MOST_COLUMNS):
            piece = values[:, start : start + MOST_COLUMNS]
            # every call draws the same signs for its first column, so every piece has a seed of its own
            seed = int(counter_hash(self.seed, 3, torch.tensor([offset + start]))) >> 1
            for first in range(0, len(piece), 32):
                rows = slice(first, first + 32)
                image = self._project(piece[rows], seed)
                sound = piece[rows].isfinite().all(dim=1) & piece[rows].any(dim=1)  # a bad row is told of later
                if not self.checked and sound.any():
                    check_projection(piece[rows][sound], image[sound])
                    self.checked = True
                out[rows] += image

    def _project(self, values: torch.Tensor, seed: int) -> torch.Tensor:
        """At most 32 rows; the kernels take 8, 16 or 32 of them."""
        width = next(width for width in (8, 16, 32) if width >= len(values))
        padded = functional.pad(values.float(), (0, 0, 0, width - len(values))).contiguous()
        kernel = getattr(self.package, f"project_rademacher_{width}")
        return kernel(padded, self.dim, seed, self.multiprocessors)[: len(values)] / self.dim**0.5


def check_projection(values: torch.Tensor, image: torch.Tensor) -> None:
    """Raise a DataflexError unless `image` [rows, k] keeps the inner products of `values` [rows, n] as a random
    projection does: within six standard deviations."""
    wanted, found = values @ values.T, image @ image.T
    norms = wanted.diagonal().sqrt()
    allowed = 6 * (2 / image.shape[1]) ** 0.5 * torch.outer(norms, norms)
    if not image.any() or not ((found - wanted).abs() <= allowed + 1e-30).all():
        what = "all zeros" if not image.any() else "inner products that are not the gradients'"
        raise DataflexError(
            f"projector fast_jl gives {what}: its kernels do not fit this GPU. Build it anew "
            "(pip install --force-reinstall --no-cache-dir --no-binary :all: fast_jl), or use projector=sketch"
        )


def check_fast_jl(dim: int, place: torch.device) -> None:
    """Raise a UsageError without CUDA, without the package, or for a width its kernels do not have."""
    if place.type != "cuda":
        raise UsageError("projector fast_jl runs on a CUDA GPU, and there is none; use projector=sketch")
    if find_spec("fast_jl") is None:
        raise UsageError("projector fast_jl needs its package: pip install fast_jl, or use projector=sketch")
    if dim % DIM_MULTIPLE:
        raise UsageError(f"projector fast_jl: proj_dim is {dim}; its kernels take multiples of {DIM_MULTIPLE}")


def make_fast_jl(dim: int, seed: int, place: torch.device) -> FastJl:
    """The projector on this machine; errors as `check_fast_jl` has them."""
    check_fast_jl(dim, place)
    import fast_jl

    return FastJl(fast_jl, dim, seed, torch.cuda.get_device_properties(place).multi_processor_count)
