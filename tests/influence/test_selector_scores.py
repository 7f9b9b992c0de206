"""`score` by a selector, without a store: the same numbers as a run or as exact scores give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataflex import dynamic, load_config, load_examples, score, warmup
from dataflex.errors import UsageError
from dataflex.influence.score_table import read_score_table, write_score_table
from dataflex.influence.scores import Scores, length_correlation
from dataflex.selectors.combined import combine


@pytest.fixture(scope="module")
def options(tiny_run: dict) -> dict:
    return {**tiny_run, "max_samples": 12}


@pytest.fixture(scope="module")
def checkpoints(options: dict, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("warm") / "out"
    warmup(load_config(options={**options, "save_steps": 1, "output_dir": str(folder)}))
    return [str(folder / f"checkpoint-{step}") for step in (1, 3)]


def scored(options: dict, path: Path, **changes: object) -> np.ndarray:
    config = load_config(options={**options, "output": str(path), "overwrite": True, **changes})
    return np.array([json.loads(line)["score"] for line in score(config).read_text().splitlines()])


@pytest.mark.parametrize(
    "more", [{}, {"marginal": True, "contrast": "pool", "normalise": "rows", "weights": "uniform"}]
)
def test_the_selector_less_is_exact(options, checkpoints, tmp_path, more):
    path = tmp_path / "s.jsonl"
    exact = scored({**options, **more}, path, exact=True, checkpoint=checkpoints)
    assert np.array_equal(exact, scored({**options, **more}, path, component_name="less", checkpoint=checkpoints))


def test_a_combination_takes_each_of_its_selectors(options, checkpoints, tmp_path):
    path = tmp_path / "s.jsonl"
    parts = {
        name: scored(options, path, component_name=name, checkpoint=checkpoints) for name in ("less", "rds", "length")
    }
    found = scored(options, path, component_name="less+rds+length", checkpoint=checkpoints)
    np.testing.assert_allclose(found, combine(list(parts.values())), atol=1e-9)


def test_losses_of_several_checkpoints_are_weighted(options, checkpoints, tmp_path):
    path = tmp_path / "s.jsonl"
    first, second = (scored(options, path, component_name="loss", checkpoint=one) for one in checkpoints)
    found = scored(options, path, component_name="loss", checkpoint=checkpoints, weights="3,1")
    np.testing.assert_allclose(found, 0.75 * first + 0.25 * second, rtol=1e-6)


@pytest.mark.parametrize("name", ["rds", "bm25", "length"])
def test_a_run_and_score_give_the_same(options, tmp_path, name):
    folder = dynamic(load_config(options={**options, "component_name": name, "output_dir": str(tmp_path / "out")}))
    scores, tokens = read_score_table(folder / "selections/step-3.parquet")
    found = scored(options, tmp_path / "s.jsonl", component_name=name)
    np.testing.assert_allclose(found, scores.score, atol=1e-6)
    wanted = length_correlation(found, tokens)
    manifest = json.loads((tmp_path / "s.jsonl.manifest.json").read_text())
    record = json.loads((folder / "run.json").read_text())
    assert manifest["length_correlation"] == pytest.approx(wanted)
    assert [made["length_correlation"] for made in record["selections"]] == [pytest.approx(wanted)] * 2
    assert tokens.tolist() == [
        sum(label != -100 for label in row.labels[1:]) for row in load_examples(load_config(options=options))
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"component_name": "rds", "eval_dataset": None}, "split eval needs eval_dataset"),
        ({"component_name": "less"}, "score --selector less needs checkpoint"),
        ({"component_name": "loss", "checkpoint": "nowhere"}, "nowhere: no adapter_config"),
        ({}, "score needs .*train_stores"),
    ],
)
def test_what_is_missing_is_named(options, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        scored(options, tmp_path / "s.jsonl", **changes)
    assert not (tmp_path / "s.jsonl").exists()


def test_correlation_with_length_is_spearmans(tmp_path):
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    for levels in (3, 50):
        score, tokens = random.normal(size=40).round(1), random.integers(levels, size=40)
        assert length_correlation(score, tokens) == pytest.approx(spearmanr(score, tokens).statistic)
    assert length_correlation(np.array([1.0, np.nan, 3.0]), np.array([5, 9, 7])) == pytest.approx(1)
    assert length_correlation(np.ones(3), np.arange(3)) is None


def test_a_score_table_reads_back(tmp_path):
    scores = Scores(np.array([3, 4]), np.array([0.5, np.nan]), {"a b": np.array([1.0, np.nan])}, ["x", "y"])
    write_score_table(tmp_path / "t.parquet", scores, np.array([7, 8]))
    found, tokens = read_score_table(tmp_path / "t.parquet")
    assert (found.row.tolist(), found.dataset, tokens.tolist()) == ([3, 4], ["x", "y"], [7, 8])
    np.testing.assert_array_equal(found.score, scores.score)
    np.testing.assert_array_equal(found.subtasks["a b"], scores.subtasks["a b"])
