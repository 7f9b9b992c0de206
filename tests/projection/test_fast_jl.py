"""What surrounds the kernels of `fast_jl`: padding, seeds, cuts, float16 and the look at what they give.

The kernels need a GPU and a build against it. In their place stands a package of the same interface that makes the
same numbers from the same arguments, signs included, slowly.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dataflex.errors import DataflexError, UsageError
from dataflex.projection import fast_jl
from dataflex.projection.fast_jl import FastJl
from dataflex.projection.table import make_projector, projector_class

DIM = 512
WORD = 0xFFFFFFFF


def kernel_signs(parameters: int, dim: int, seed: int, tiles: int) -> torch.Tensor:
    """[parameters, dim] of ±1: the matrix of fast_jl 0.1.3's kernels.

    Each lane of a warp seeds an XORWOW generator (Marsaglia 2003, with cuRAND's constants) by its column and tile;
    16 bits of each draw are the signs of 16 parameters in two neighbouring columns of the warp's 32.
    """
    length = -(-parameters // tiles)
    column, tile = torch.arange(dim), torch.arange(tiles)[:, None]
    key = (seed + 658105236 * column + 359124577 * tile) & WORD
    low, high = (1099087573 * (key ^ 0xAAD26B49)) & WORD, (2591861531 * 0xF7DCEFDD) & WORD
    state = [
        (123456789 + low) & WORD,
        362436069 ^ low,
        torch.full_like(low, (521288629 + high) & WORD),
        torch.full_like(low, 88675123 ^ high),
        (5783321 + low) & WORD,
    ]
    counter = (6615241 + low + high) & WORD
    signs = []
    for _ in range(-(-length // 16)):
        mixed = state[0] ^ (state[0] >> 2)
        state = [*state[1:], ((state[4] ^ (state[4] << 4)) ^ (mixed ^ (mixed << 1))) & WORD]
        counter = (counter + 362437) & WORD
        draw = (state[4] + counter) & WORD
        bits = (draw[..., None] >> torch.arange(16)) & 1
        # [tile, warp, upper or lower half, pair of columns, pair of parameters, left or right]
        bits = bits.view(tiles, dim // 32, 2, 16, 8, 2).permute(0, 4, 2, 1, 3, 5)
        signs.append(bits.reshape(tiles, 16, dim))
    matrix = torch.cat(signs, dim=1)[:, :length].reshape(tiles * length, dim)
    return 2.0 * matrix[:parameters] - 1


def kernels(spoil=lambda image: image) -> types.SimpleNamespace:
    def project(width: int):
        def kernel(values: torch.Tensor, dim: int, seed: int, tiles: int) -> torch.Tensor:
            assert values.shape[0] == width
            assert values.is_contiguous()
            assert values.dtype in (torch.float16, torch.float32)
            assert 0 <= seed < 2**31
            # the products of the GPU's kernel are of float16, its sums of float32
            return spoil(values.half().float() @ kernel_signs(values.shape[1], dim, seed, tiles))

        return kernel

    return types.SimpleNamespace(**{f"project_rademacher_{width}": project(width) for width in (8, 16, 32)})


def project(projector: FastJl, vectors: torch.Tensor, *cuts: int) -> torch.Tensor:
    out = torch.zeros(len(vectors), projector.dim)
    for start, end in zip([0, *cuts], [*cuts, vectors.shape[1]], strict=True):
        projector.add(out, start, vectors[:, start:end].clone())
    return out


def test_the_kernel_s_signs_are_those_of_its_source():
    """Numbers that fast_jl 0.1.3's own source gave, compiled for a processor with cuRAND's generator."""
    vector = (torch.arange(1000) % 17 - 8).float()
    image = vector @ kernel_signs(1000, DIM, 12345, 4)
    assert image[[0, 1, 2, 17, 31, 32, 255, 510, 511]].int().tolist() == [-77, 45, 203, -75, 77, 99, 205, 23, 199]


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 70])
def test_inner_products_come_through_whatever_the_batch(rows, monkeypatch):
    monkeypatch.setattr(fast_jl, "MAX_PARAMETERS", 1000)
    monkeypatch.setattr(fast_jl, "TILE", 300)
    vectors = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(rows))
    vectors[:, 1500:] = vectors[:, :1500]  # one sign for both halves would double what they share
    image = project(FastJl(kernels(), DIM, 7), vectors, 1500)
    norms = vectors.norm(dim=1)
    error = (image @ image.T - vectors @ vectors.T) / torch.outer(norms, norms)
    assert error.abs().max() < 6 * (2 / DIM) ** 0.5
    alone = project(FastJl(kernels(), DIM, 7), vectors[-1:], 1500)
    torch.testing.assert_close(alone[0], image[-1], rtol=1e-4, atol=1e-3)


def relative_variance(dim: int) -> float:
    """Of inner products of unlike vectors, in units of ‖x‖²‖y‖²/k, over an adapter of many small tensors."""
    tensors, length = 64, 128
    vectors = torch.randn(64, tensors * length, generator=torch.Generator().manual_seed(1))
    projector = FastJl(kernels(), dim, 5)
    projector.checked = True  # the mean is of interest here, not the first look
    image = project(projector, vectors, *range(length, tensors * length, length))
    norms = vectors.norm(dim=1)
    error = (image @ image.T - vectors @ vectors.T) / torch.outer(norms, norms)
    return dim * error[~torch.eye(64, dtype=torch.bool)].square().mean().item()


def test_many_small_tensors_are_projected_as_well_as_theory_has_it(monkeypatch):
    assert 0.85 < relative_variance(2048) < 1.15
    monkeypatch.setattr(fast_jl, "RUN_IN", 0)
    assert relative_variance(2048) > 5  # what the kernels give when their generators have not run in


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1.0, 1e7])
def test_gradients_of_any_size_pass_through_float16(scale):
    """Unscaled, float16 loses what is below 6e-8, and holds nothing above 65504."""
    vectors = torch.randn(8, 2000, generator=torch.Generator().manual_seed(2))
    vectors *= torch.logspace(-6, 0, 2000)  # and within one row
    plain = project(FastJl(kernels(), DIM, 7), vectors)
    torch.testing.assert_close(project(FastJl(kernels(), DIM, 7), vectors * scale) / scale, plain, rtol=2e-3, atol=2e-3)
    mixed = project(FastJl(kernels(), DIM, 7), torch.cat([vectors[:1] * scale, vectors[1:]]))
    torch.testing.assert_close(mixed[1:], plain[1:])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (torch.zeros_like, "all zeros"),
        (lambda image: image * 3, "inner products that are not"),
        (lambda image: torch.roll(image, 1, dims=0), "inner products that are not"),
        (lambda image: image * float("nan"), "inner products that are not"),
    ],
)
def test_kernels_that_do_not_project_are_found_out(spoil, words):
    vectors = torch.randn(4, 2000) * torch.tensor([1.0, 2, 3, 4])[:, None]
    with pytest.raises(DataflexError, match=words):
        project(FastJl(kernels(spoil), DIM, 7), vectors, 1000)


def test_a_bad_row_is_not_blamed_on_the_kernels():
    vectors = torch.randn(5, 2000)
    vectors[1] = float("nan")
    vectors[2] = 0
    vectors[3, 7] = float("inf")
    image = project(FastJl(kernels(), DIM, 7), vectors, 1000)
    assert image.isfinite().all(dim=1).tolist() == [True, False, True, False, True]
    assert not image[2].any()


def test_the_projector_is_made_from_the_installed_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_jl", kernels())
    vectors = torch.randn(3, 2000, generator=torch.Generator().manual_seed(3))
    made = projector_class("fast_jl").make(2000, DIM, 7, torch.device("cpu"))
    assert torch.equal(project(made, vectors, 700), project(FastJl(kernels(), DIM, 7), vectors, 700))


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(UsageError, match="CUDA GPU, and there is none"):
        make_projector("fast_jl", 100, DIM, 1, torch.device("cpu"))
    with pytest.raises(UsageError, match="pip install --no-build-isolation fast_jl"):
        make_projector("fast_jl", 100, DIM, 1, torch.device("cuda"))
    monkeypatch.setattr(fast_jl, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="proj_dim is 700; its kernels take multiples of 512"):
        make_projector("fast_jl", 100, 700, 1, torch.device("cuda"))
