"""Linear maps from the flat parameter vector (P numbers) to k, applied tensor by tensor as gradients appear.

Every random number is an integer hash of (seed, position): no generator, so the same map comes out on
every device, at every batch size and thread count, and no matrix is ever stored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

MASK = 0xFFFFFFFF
# Of the dense matrix at a time: 8 MiB of float32 stay near a processor's cache, 128 MiB keep a GPU busy.
PIECE_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 25}
# Where starting a kernel costs more than its work over one block of a sketch, whole blocks are added together.
SLOW_TO_START = {"cuda"}
FEWEST_BLOCKS = 4
GATHERED_NUMBERS = 1 << 26  # at a time: 256 MiB of float32


class Projector(Protocol):
    """A linear map P → k that is fed one slice of the parameters at a time."""

    dim: int
    """k, the width of a projected row."""

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        """Add the image of `values` [rows, n], which stand at parameters offset … offset+n, to `out` [rows, k].

        May overwrite `values`.
        """


def hash32(values: Any) -> Any:
    """MurmurHash3's 32-bit finalizer, on an int or an int64 tensor below 2³² (Appleby, public domain)."""
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & MASK
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & MASK
    return values ^ (values >> 16)


def counter_hash(seed: int, stream: int, counters: Any) -> Any:
    """32 random bits for each counter (an int, or an int64 tensor, below 2⁶³), independent by `seed` and `stream`."""
    key = hash32(hash32(seed & MASK) ^ hash32((seed >> 32 & MASK) + 0x9E3779B9 + stream & MASK))
    high = hash32((counters >> 32) ^ key)
    return hash32((counters & MASK) ^ hash32(high + 0x632BE5AB & MASK))


class Sketch:
    """Sign-flipped, cyclically shifted fold: parameter j goes to bucket (j + shift[j ÷ k]) mod k with a random sign.

    An inner product of two sketches is unbiased, with variance at most (‖x‖²‖y‖² + ⟨x,y⟩²)/k (the
    count-sketch bound of Charikar, Chen & Farach-Colton 2002; two parameters of one block never
    collide, of different blocks with probability 1/k). Costs one multiplication and one addition
    per parameter, and one byte of memory per parameter for the signs.
    """

    def __init__(self, parameters: int, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.signs = torch.empty(parameters, dtype=torch.int8, device=device)
        for start in range(0, parameters, 1 << 20):
            counters = torch.arange(start, min(start + (1 << 20), parameters), device=device)
            self.signs[start : start + (1 << 20)] = 1 - 2 * (counter_hash(seed, 0, counters) & 1)
        blocks = torch.arange(-(-parameters // dim), device=device)
        self.shift = counter_hash(seed, 1, blocks) * dim >> 32
        self.shifts: list[int] = self.shift.tolist()

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
        start, end = offset, offset + values.shape[1]
        while start < end:
            block, place = divmod(start, self.dim)
            bucket = (place + self.shifts[block]) % self.dim
            # up to the end of the block, and without wrapping round the buckets
            length = min(end - start, self.dim - place, self.dim - bucket)
            out[:, bucket : bucket + length].add_(values[:, start - offset : start - offset + length])
            start += length

    def _add_blocks(self, out: torch.Tensor, first: int, values: torch.Tensor) -> None:
        """The same for whole blocks, from number `first` on, in a few large steps."""
        blocks = values.unflatten(1, (-1, self.dim))
        some = max(1, GATHERED_NUMBERS // (max(16, len(values)) * self.dim))  # their buckets take memory too
        bucket = torch.arange(self.dim, device=out.device)
        for start in range(0, blocks.shape[1], some):
            part = blocks[:, start : start + some]
            shift = self.shift[first + start : first + start + part.shape[1], None]
            out += part.gather(2, ((bucket - shift) % self.dim).expand_as(part)).sum(dim=1)


class Rademacher:
    """Dense random signs over √k: the projection LESS uses, exact in expectation with variance about ‖x‖²‖y‖²/k.

    Costs rows × n × k multiplications, and n × k hashed bits a batch whatever its rows; the matrix
    exists only in small pieces.
    """

    def __init__(self, parameters: int, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.seed = seed
        self.words = -(-dim // 32)  # one hash gives 32 signs
        self.chunk = max(1, PIECE_NUMBERS[torch.device(device).type] // dim)
        self.bits = torch.arange(8, dtype=torch.uint8, device=device)

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


class Identity:
    """No projection: k = P. Exact, and as large as the adapter for every row."""

    def __init__(self, parameters: int) -> None:
        self.dim = parameters

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        out[:, offset : offset + values.shape[1]] = values


class Queries:
    """Inner products with q given vectors [q, P] in full parameter space, plus ‖·‖² as the last column."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors
        self.dim = vectors.shape[0] + 1

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        out[:, :-1].addmm_(values, self.vectors[:, offset : offset + values.shape[1]].T)
        out[:, -1].add_((values * values).sum(dim=1))


def check_projector(name: str, dim: int, device: torch.device) -> None:
    """Raise a UsageError where the projector that `projector:` names cannot run here."""
    if name == "fast_jl":
        from dataflex.gradients.fast_jl import check_fast_jl

        check_fast_jl(dim, device)


def make_projector(name: str, parameters: int, dim: int, seed: int, device: torch.device | str) -> Projector:
    """The projector that `projector:` names; `none` ignores `dim`."""
    if name == "none":
        return Identity(parameters)
    if name == "fast_jl":
        from dataflex.gradients.fast_jl import make_fast_jl

        return make_fast_jl(dim, seed, torch.device(device))
    return {"sketch": Sketch, "rademacher": Rademacher}[name](parameters, dim, seed, device)
