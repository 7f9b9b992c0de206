"""The estimate of a projection's error against what the projection did to scores of whole gradients."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from made_stores import make_store, unit

from dataflex import load_config
from dataflex.influence.projection_error import (
    ENOUGH_ROWS,
    FAITHFUL,
    halves_of_scores,
    projection_correlation,
    warn_of_projection,
)
from dataflex.influence.score_file import read_scores
from dataflex.influence.scoring import score
from dataflex.influence.sidecar import facts_of
from dataflex.influence.stored import stored_cosines
from dataflex.projection.table import make_projector
from dataflex.store.manifest import Manifest
from dataflex.store.reader import open_store

PARAMETERS, DIM, ROWS, TARGETS = 20_000, 512, 300, 10


def gradients(spread: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At two checkpoints rows [N, P], which share most of their direction and have more or less of two tasks', and the
    tasks' rows [V, P] in turn."""
    generator = np.random.default_rng(seed)
    shared, *tasks = generator.normal(size=(3, PARAMETERS))
    shares = spread * generator.normal(size=(ROWS, 2))
    made = []
    for _ in range(2):
        rows = shared + shares @ np.stack(tasks) + generator.normal(size=(ROWS, PARAMETERS))
        made.append((rows, np.stack(tasks * (TARGETS // 2)) + generator.normal(size=(TARGETS, PARAMETERS))))
    return made


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("projector", ["sketch", "rademacher"])
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_the_correlation_with_exact_scores_is_estimated_from_projected_rows(tmp_path, spread, projector, reduce):
    """Two checkpoints of unequal weight, two subtasks, and a row that was skipped."""
    estimates, measured, weights = [], [], (0.7, 0.3)
    for seed in range(4):
        exact, paths = np.zeros(ROWS), {"t": [], "v": []}
        for number, (rows, targets) in enumerate(gradients(spread, seed)):
            by_task = [(unit(rows) @ unit(targets[task::2]).T).mean(axis=1) for task in range(2)]
            exact += weights[number] * getattr(np, reduce)(by_task, axis=0)
            rows[7] = 0
            project = make_projector(projector, PARAMETERS, DIM, seed, "cpu")
            for name, values in (("t", rows), ("v", targets)):
                image = torch.zeros(len(values), DIM)
                project.add(image, 0, torch.from_numpy(values.astype(np.float32)))
                subtask = [["a", "b"][index % 2] for index in range(TARGETS)] if name == "v" else None
                paths[name].append(make_store(tmp_path / f"{name}-{seed}-{number}.h5", image.numpy(), subtask=subtask))
        options = {"train_stores": paths["t"], "eval_stores": paths["v"], "reduce": reduce, "weights": "0.7,0.3"}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            path = score(load_config(options={**options, "output": str(tmp_path / f"s-{seed}.jsonl")}))
        estimate = facts_of(path)["projection_correlation"]
        assert [f"about {estimate:.2f}" in str(one.message) for one in said] == [True] * (estimate < FAITHFUL)
        estimates.append(estimate**2)
        measured.append(np.corrcoef(read_scores(path).score, np.delete(exact, 7))[0, 1] ** 2)
    low = 0.05 if reduce == "mean" else 0.2
    assert -low <= np.mean(estimates) - np.mean(measured) <= 0.05


@pytest.mark.parametrize(("reduce", "chosen"), [("mean", np.mean), ("max", np.max)])
def test_halves_are_the_products_of_either_half_and_add_up_to_the_score(tmp_path, reduce, chosen):
    generator = np.random.default_rng(1)
    rows, targets = generator.normal(size=(ROWS, 65)), generator.normal(size=(2, 65))
    made = [make_store(tmp_path / "t.h5", rows), make_store(tmp_path / "v.h5", targets, subtask=["a", "b"])]
    with open_store(made[0]) as train, open_store(made[1]) as validation:
        halves = halves_of_scores(stored_cosines(train, validation), reduce)
    products = unit(rows)[:, None] * unit(targets)[None]  # [N, S, k]
    scores = chosen(products.sum(axis=2), axis=1)
    np.testing.assert_allclose(halves.sum(axis=0), scores, atol=1e-6)
    first = products[:, :, :32].sum(axis=2)
    highest = products.sum(axis=2).argmax(axis=1)
    wanted = first.mean(axis=1) if reduce == "mean" else first[np.arange(ROWS), highest]
    np.testing.assert_allclose(halves[0], wanted, atol=1e-6)


def test_turns_and_single_validation_rows_are_not_estimated(tmp_path):
    rows, targets = gradients(0.3, 0)[0]
    made = [str(make_store(tmp_path / f"{name}.h5", values)) for name, values in (("t", rows), ("v", targets))]
    options = {"train_stores": made[:1], "eval_stores": made[1:], "output": str(tmp_path / "scores.jsonl")}
    for settings in ({"reduce": "round-robin"}, {"reduce": "rows"}, {"normalise": "rows", "reduce": "mean"}):
        path = score(load_config(options={**options, **settings, "overwrite": True}))
        assert "projection_correlation" not in facts_of(path)


def test_with_whole_gradients_nothing_is_estimated(tmp_path):
    rows, targets = np.random.default_rng(0).normal(size=(2, ROWS, 64))
    made = [
        make_store(tmp_path / f"{name}.h5", values, projector="none") for name, values in (("t", rows), ("v", targets))
    ]
    with open_store(made[0]) as train, open_store(made[1]) as validation:
        assert stored_cosines(train, validation).first_half is None


def test_halves_that_contradict_each_other_say_nothing_and_equal_halves_all():
    half = np.random.default_rng(0).normal(size=ROWS)
    assert correlation_of(half, half) == pytest.approx(1)
    assert correlation_of(half, np.roll(half, 1) * 1e-9 - half) == 0
    assert correlation_of(np.zeros(ROWS), np.zeros(ROWS)) is None
    assert correlation_of(half[: ENOUGH_ROWS - 1], half[: ENOUGH_ROWS - 1]) is None
    with_bad = np.append(half, np.nan)
    assert correlation_of(with_bad, with_bad) == pytest.approx(1)
    assert projection_correlation([np.stack([half, half]), None], [0.5, 0.5]) is None


def correlation_of(first: np.ndarray, second: np.ndarray) -> float | None:
    return projection_correlation([np.stack([first, second])], [1.0])


def test_the_warning_names_the_width_and_the_way_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for faithful in (None, FAITHFUL, 0.95):
            warn_of_projection(faithful, Manifest("float16", 8192))
    said = (
        "the projection to 8192 numbers blurs the gradients' scores: their correlation with those of whole gradients "
        "is about 0.50; a larger proj_dim blurs less, proj_dim: null not at all"
    )
    for dtype, words in (("float16", said), ("int1", said.replace("numbers", "numbers, kept as int1,"))):
        with pytest.warns(UserWarning, match=f"^{re.escape(words)}$"):
            warn_of_projection(0.5, Manifest(dtype, 8192))
