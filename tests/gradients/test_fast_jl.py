"""What surrounds the kernels of `fast_jl`: padding, seeds, cuts and the look at what they give.

The kernels need a GPU and a build against it. In their place stands a package of the same interface that draws its
signs by seed and column, as they do.
"""

from __future__ import annotations

import types

import pytest
import torch

from dataflex.errors import DataflexError, UsageError
from dataflex.gradients import fast_jl
from dataflex.gradients.fast_jl import FastJl, make_fast_jl

DIM = 512


def kernels(spoil=lambda image: image) -> types.SimpleNamespace:
    def project(width: int):
        def kernel(values: torch.Tensor, dim: int, seed: int, multiprocessors: int) -> torch.Tensor:
            assert values.shape[0] == width
            assert values.is_contiguous()
            assert 0 <= seed < 2**31
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (dim, values.shape[1]), generator=generator).float() * 2 - 1
            return spoil(values @ signs.T)

        return kernel

    return types.SimpleNamespace(**{f"project_rademacher_{width}": project(width) for width in (8, 16, 32)})


def project(projector: FastJl, vectors: torch.Tensor, cut: int) -> torch.Tensor:
    out = torch.zeros(len(vectors), DIM)
    projector.add(out, 0, vectors[:, :cut].clone())
    projector.add(out, cut, vectors[:, cut:].clone())
    return out


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 70])
def test_inner_products_come_through_whatever_the_batch(rows, monkeypatch):
    monkeypatch.setattr(fast_jl, "MOST_COLUMNS", 1000)
    vectors = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(rows))
    vectors[:, 1500:] = vectors[:, :1500]  # one sign for both halves would double what they share
    image = project(FastJl(kernels(), DIM, 7, 108), vectors, 1500)
    norms = vectors.norm(dim=1)
    error = (image @ image.T - vectors @ vectors.T) / torch.outer(norms, norms)
    assert error.abs().max() < 6 * (2 / DIM) ** 0.5
    alone = project(FastJl(kernels(), DIM, 7, 108), vectors[-1:], 1500)
    torch.testing.assert_close(alone[0], image[-1], rtol=1e-4, atol=1e-3)


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
        project(FastJl(kernels(spoil), DIM, 7, 108), vectors, 1000)


def test_a_bad_row_is_not_blamed_on_the_kernels():
    vectors = torch.randn(4, 2000)
    vectors[1] = float("nan")
    vectors[2] = 0
    image = project(FastJl(kernels(), DIM, 7, 108), vectors, 1000)
    assert image.isnan().all(dim=1).tolist() == [False, True, False, False]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(UsageError, match="CUDA GPU, and there is none"):
        make_fast_jl(DIM, 1, torch.device("cpu"))
    with pytest.raises(UsageError, match="pip install fast_jl"):
        make_fast_jl(DIM, 1, torch.device("cuda"))
    monkeypatch.setattr(fast_jl, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="proj_dim is 700; its kernels take multiples of 512"):
        make_fast_jl(700, 1, torch.device("cuda"))
