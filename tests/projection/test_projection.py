"""Projections: the same numbers everywhere, unbiased, with the variance theory gives."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dataflex.projection import sketch as sketch_module
from dataflex.projection.counter_hash import counter_hash
from dataflex.projection.identity import Identity
from dataflex.projection.queries import Queries
from dataflex.projection.rademacher import Rademacher
from dataflex.projection.sketch import Sketch
from dataflex.projection.table import make_projector

P, K = 5000, 256

GOLDEN_HASH = [3782349044, 984730159, 2852562979, 650394150, 184253577]
GOLDEN = {
    "sketch": "bd648cb515245b9b4a8ead9fcdb7925b5304c4c1a21eb5c1e1c5c648838d99f7",
    "rademacher": "7de646e5a4e8e18b518c2e61e97c56c0de18384b4c3b269c470530f0fff22fa2",
}


def project(projector, vectors: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """`vectors` [n, P] through `projector`, handed over in slices that end at `cuts`."""
    out = torch.zeros(len(vectors), projector.dim)
    for start, end in zip([0, *cuts], [*cuts, vectors.shape[1]], strict=True):
        projector.add(out, start, vectors[:, start:end].clone())
    return out


def gaussian(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, P, generator=torch.Generator().manual_seed(seed))


def test_the_hash_is_pinned():
    bits = counter_hash(123, 0, torch.tensor([0, 1, 2, 2**31, 2**40]))
    assert bits.tolist() == GOLDEN_HASH
    assert counter_hash(123, 1, torch.tensor([0])).item() != bits[0].item()
    assert counter_hash(123 + 2**32, 0, torch.tensor([0])).item() != bits[0].item()


def test_hash_bits_are_fair():
    bits = counter_hash(7, 0, torch.arange(1 << 16))
    share = torch.stack([(bits >> bit & 1).float().mean() for bit in range(32)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 256  # five standard errors


@pytest.mark.parametrize("name", ["sketch", "rademacher"])
def test_golden_vectors(name):
    """Small integers, so that sums are exact in any order: the digest holds on every device and library."""
    vector = (torch.arange(P, dtype=torch.float32) % 17 - 8)[None]
    out = project(make_projector(name, P, K, 123, "cpu"), vector, [])
    whole = out if name == "sketch" else out * K**0.5
    digest = hashlib.sha256(whole.round().to(torch.int32).numpy().tobytes()).hexdigest()
    assert digest == GOLDEN[name]


@pytest.mark.parametrize("name", ["sketch", "rademacher", "none"])
def test_slices_and_batches_do_not_matter(name):
    vectors = gaussian(3)
    whole = project(make_projector(name, P, K, 5, "cpu"), vectors, [])
    sliced = project(make_projector(name, P, K, 5, "cpu"), vectors, [1, 100, 777, 4096])
    alone = project(make_projector(name, P, K, 5, "cpu"), vectors[1:2], [2048])
    torch.testing.assert_close(whole, sliced, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)


def test_the_sketch_is_the_map_its_docstring_says():
    sketch = Sketch(P, K, 3)
    vector = gaussian(1)
    wanted = torch.zeros(K)
    for j in range(P):
        wanted[(j + sketch.shifts[j // K]) % K] += sketch.signs[j] * vector[0, j]
    torch.testing.assert_close(project(sketch, vector, [999])[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_floats", [1, 3 * 2 * K, 1 << 26])
@pytest.mark.parametrize("cuts", [[], [1, 100, 777, 4096], [K, 4 * K, 4 * K + 1]])
def test_whole_blocks_together_are_the_same_sketch(cuts, max_floats, monkeypatch):
    vectors = gaussian(3).round()  # whole numbers: the same in any order
    sketch = Sketch(P, K, 5)
    one_by_one = project(sketch, vectors, cuts)
    monkeypatch.setattr(sketch_module, "SLOW_TO_START", {"cpu"})
    monkeypatch.setattr(sketch_module, "MAX_FLOATS", max_floats)
    together = []
    monkeypatch.setattr(
        sketch, "_add_blocks", lambda *args: (together.append(args[1]), Sketch._add_blocks(sketch, *args))
    )
    assert torch.equal(project(sketch, vectors, cuts), one_by_one)
    assert together


def test_rademacher_is_its_matrix():
    projector = Rademacher(P, K, 3)
    matrix = projector.matrix(0, P)
    assert set((matrix * K**0.5).round().unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(project(projector, gaussian(2), []), gaussian(2) @ matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sketch", "rademacher"])
def test_inner_products_are_unbiased_with_the_variance_of_theory(name):
    x, y = gaussian(2, seed=8)
    y = 0.4 * x + y  # an inner product well away from zero
    seeds = 400 if name == "sketch" else 60
    found = []
    for seed in range(seeds):
        px, py = project(make_projector(name, P, K, seed, "cpu"), torch.stack([x, y]), [])
        found.append(torch.dot(px, py).item())
    estimates = torch.tensor(found, dtype=torch.float64)
    true = torch.dot(x.double(), y.double())
    bound = (x.norm() ** 2 * y.norm() ** 2 + true**2) / K
    standard_error = (bound / seeds).sqrt()
    assert abs(estimates.mean() - true) < 4 * standard_error
    assert 0.6 * bound < estimates.var() < 1.5 * bound


def test_aligned_outliers_do_not_collapse_the_sketch():
    """Large columns that repeat with period k are what a fold without shifts adds up in one bucket."""
    x = torch.zeros(1, P)
    x[0, 7::K] = 10.0
    energies = [project(Sketch(P, K, seed), x, []).norm().item() ** 2 / x.norm().item() ** 2 for seed in range(200)]
    assert sum(energies) / 200 == pytest.approx(1, abs=0.1)
    assert max(energies) < 3  # in one bucket, the signs would let it reach the number of blocks, 20


def test_queries_are_inner_products_and_the_norm():
    queries, vectors = gaussian(2, seed=3), gaussian(4, seed=4)
    out = project(Queries(queries), vectors, [17, 3000])
    torch.testing.assert_close(out[:, :2], vectors @ queries.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out[:, 2], vectors.norm(dim=1) ** 2, rtol=1e-4, atol=1e-3)


def test_identity_keeps_every_number():
    assert torch.equal(project(Identity(P), gaussian(2), [10, 20]), gaussian(2))
