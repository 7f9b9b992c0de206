"""`projector: fast_jl`: the dense ±1 projection of the package of that name, LESS's and TRAK's own kernel, on CUDA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

import torch
from torch.nn import functional

from dataflex.errors import DataflexError, UsageError
from dataflex.projection.counter_hash import counter_hash
from dataflex.projection.protocol import NamedProjector
from dataflex.provenance import device_name

# its build imports torch, and asks for compute capability 7.0, which CUDA 13 no longer compiles
INSTALL = "pip install --no-build-isolation fast_jl"
DIM_MULTIPLE = 512
TILE = 4096  # parameters that take their signs from one run of the kernel's generators
RUN_IN = 768  # zeros before them: a generator's first draws are nearly the same in every column of the matrix
MAX_PARAMETERS = 1 << 18  # of a call, which holds an image of each tile; the kernel's own limit is 2³² numbers
LARGEST_EXPONENT = 14  # the kernel computes with float16, which holds 2⁻²⁴ to 2¹⁶: each row is scaled to below 2¹⁴


class FastJl(NamedProjector):
    """Dense random signs over √k, made inside the kernel: unbiased, with variance about ‖x‖²‖y‖²/k.

    Costs rows × n × k multiplications, about a fifth more for the run-in, and no memory for the signs. They depend
    on how the parameters are cut, so they are neither those of `rademacher` nor LESS's own.

    The kernel seeds a generator for every column and tile by adding multiples of two constants to `seed`. Such seeds
    are too alike for its generator, XORWOW: over the first 256 parameters of a tile the columns agree so far that
    the variance is 3 to 130 times as large (between such parameters, at k = 8192), and a tensor of an adapter has
    hardly more in each of as many tiles as a GPU has multiprocessors. So tiles are few and begin with zeros.

    The first rows are looked at: a kernel built for another GPU gives zeros, or nonsense, without an error.

    Args:
        package: the module `fast_jl`.
    """

    def __init__(self, package: Any, dim: int, seed: int) -> None:
        self.package = package
        self.dim = dim
        self.seed = seed
        self.checked = False

    @classmethod
    def make(cls, parameters: int, dim: int, seed: int, device: torch.device) -> Self:
        import fast_jl

        return cls(fast_jl, dim, seed)

    @classmethod
    def check(cls, dim: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise UsageError("projector fast_jl runs on a CUDA GPU, and there is none; use projector=sketch")
        if find_spec("fast_jl") is None:
            raise UsageError(
                f"projector fast_jl needs its package, built with CUDA 12 beside a torch for CUDA 12: {INSTALL}; "
                "or use projector=sketch"
            )
        if dim % DIM_MULTIPLE:
            raise UsageError(f"projector fast_jl: proj_dim is {dim}; its kernels take multiples of {DIM_MULTIPLE}")

    @classmethod
    def manifest_device(cls) -> str | None:
        """The GPU: the package's kernels are built for one kind of GPU."""
        return device_name()

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        for start in range(0, values.shape[1], MAX_PARAMETERS):
            piece = values[:, start : start + MAX_PARAMETERS]
            # every call draws the same signs for its first parameter, so every piece has a seed of its own
            seed = counter_hash(self.seed, 3, offset + start) >> 1
            for first in range(0, len(piece), 32):
                rows = slice(first, first + 32)
                image = self._project(piece[rows], seed)
                self._check(piece[rows], image)
                out[rows].add_(image)

    def _project(self, values: torch.Tensor, seed: int) -> torch.Tensor:
        """At most 32 rows of at most MAX_PARAMETERS; the kernels take 8, 16 or 32 of them."""
        rows, parameters = values.shape
        width = next(width for width in (8, 16, 32) if width >= rows)
        tiles = -(-parameters // TILE)
        length = -(-parameters // tiles)
        exponent = torch.frexp(values.abs().amax(dim=1, keepdim=True)).exponent
        shift = (LARGEST_EXPONENT - exponent).clamp(-126, 126)
        scaled = torch.ldexp(values, shift).half()
        padded = functional.pad(scaled, (0, tiles * length - parameters, 0, width - rows)).view(width, tiles, length)
        padded = functional.pad(padded, (RUN_IN, 0)).flatten(1)
        image = getattr(self.package, f"project_rademacher_{width}")(padded, self.dim, seed, tiles)[:rows]
        return torch.ldexp(image / self.dim**0.5, -shift)

    def _check(self, values: torch.Tensor, image: torch.Tensor) -> None:
        if self.checked:
            return
        sound = values.isfinite().all(dim=1) & values.any(dim=1)  # a bad row is told of later
        if sound.any():
            check_projection(values[sound], image[sound])
            self.checked = True


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
            f"({INSTALL} --force-reinstall --no-deps --no-cache-dir), or use projector=sketch"
        )
