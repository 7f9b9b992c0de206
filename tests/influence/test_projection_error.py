"""The estimate of a projection's error against what the projection did to scores of whole gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_stores import make_store, unit

from dataflex.influence.projection_error import ENOUGH_ROWS, exact_correlation, projection_warning
from dataflex.influence.stored import stored_cosines
from dataflex.projection.table import make_projector
from dataflex.store.reader import open_store

PARAMETERS, DIM, ROWS, TARGETS = 20_000, 512, 300, 10


def gradients(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, P] that share most of their direction and have more or less of a task's, and the task's rows [V, P]."""
    generator = np.random.default_rng(seed)
    shared, task = generator.normal(size=(2, PARAMETERS))
    share = spread * generator.normal(size=(ROWS, 1))
    rows = shared + share * task + generator.normal(size=(ROWS, PARAMETERS))
    return rows, task + generator.normal(size=(TARGETS, PARAMETERS))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("projector", ["sketch", "rademacher"])
@pytest.mark.parametrize("spread", [0.01, 0.05, 0.1, 0.3])
def test_the_correlation_with_exact_scores_is_estimated_from_projected_rows(tmp_path, spread, projector, per_row):
    found, wanted = [], []
    for seed in range(4):
        rows, targets = gradients(spread, seed)
        project = make_projector(projector, PARAMETERS, DIM, seed, "cpu")
        images = []
        for values in (rows, targets):
            image = torch.zeros(len(values), DIM)
            project.add(image, 0, torch.from_numpy(values.astype(np.float32)))
            images.append(image.numpy())
        made = [make_store(tmp_path / f"{name}-{seed}.h5", image) for name, image in zip("tv", images, strict=True)]
        with open_store(made[0]) as train, open_store(made[1]) as validation:
            _, cosines, halves = stored_cosines(train, validation, per_row=per_row)
        np.testing.assert_allclose(halves.sum(axis=0), cosines.mean(axis=0), atol=1e-6)
        exact = (unit(rows) @ unit(targets).T).mean(axis=1)
        wanted.append(np.corrcoef(cosines.mean(axis=0), exact)[0, 1] ** 2)
        found.append(exact_correlation(halves) ** 2)
    assert np.mean(found) == pytest.approx(np.mean(wanted), abs=0.1)


def test_with_whole_gradients_nothing_is_estimated(tmp_path):
    rows, targets = np.random.default_rng(0).normal(size=(2, ROWS, 64))
    made = [
        make_store(tmp_path / f"{name}.h5", values, projector="none") for name, values in (("t", rows), ("v", targets))
    ]
    with open_store(made[0]) as train, open_store(made[1]) as validation:
        assert stored_cosines(train, validation).halves is None


def test_halves_that_contradict_each_other_say_nothing_and_equal_halves_all():
    half = np.random.default_rng(0).normal(size=ROWS)
    assert exact_correlation(np.stack([half, half])) == pytest.approx(1)
    assert exact_correlation(np.stack([half, np.roll(half, 1) * 1e-9 - half])) == 0
    assert exact_correlation(np.zeros((2, ROWS))) is None
    assert exact_correlation(np.stack([half, half])[:, : ENOUGH_ROWS - 1]) is None
    with_bad = np.stack([np.append(half, np.nan)] * 2)
    assert exact_correlation(with_bad) == pytest.approx(1)


def test_the_warning_names_the_width_and_the_way_out():
    assert projection_warning(0.95, 8192) is None
    assert projection_warning(None, 8192) is None
    assert projection_warning(0.5, 8192) == (
        "the projection to 8192 numbers blurs these scores: the correlation of mean cosines with those of whole "
        "gradients is about 0.50; a larger proj_dim blurs less, proj_dim: null not at all"
    )
