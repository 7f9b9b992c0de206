"""The arithmetic of scores against the plain float64 formula, and the files around it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from made_stores import make_store, unit

from dataflex import load_config
from dataflex.errors import UsageError
from dataflex.influence import stored
from dataflex.influence.score_file import read_scores, write_scores
from dataflex.influence.scores import (
    Scores,
    influence,
    parse_weights,
    ranking,
    round_robin,
    standardise,
    winners,
)
from dataflex.influence.scoring import score
from dataflex.store.reader import GradientStore, open_store

K = 64


def plain_formula(trains, validations, subtask, weights, how) -> np.ndarray:
    """Σ_i η̄_i · agg cos, one cosine at a time."""
    total = np.zeros(len(trains[0]))
    for train, validation, weight in zip(trains, validations, weights, strict=True):
        for index, row in enumerate(unit(train)):
            cosines = [float(row @ other) for other in unit(validation)]
            by_subtask = {}
            for name, cosine in zip(subtask, cosines, strict=True):
                by_subtask.setdefault(name, []).append(cosine)
            means = [sum(values) / len(values) for values in by_subtask.values()]
            total[index] += weight * (max(means) if how == "max" else sum(means) / len(means))
    return total


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("weights", ["lr", "uniform", "3,1"])
def test_scores_from_stores_equal_the_plain_formula(tmp_path, how, weights):
    random = np.random.default_rng(0)
    trains = [random.normal(size=(50, K)) * random.uniform(1e-3, 1e3, (50, 1)) for _ in range(2)]
    validations = [random.normal(size=(9, K)) for _ in range(2)]
    subtask = list("aabbbcaac")
    rates = [3e-4, 1e-4]
    for index in range(2):
        make_store(tmp_path / f"t{index}.h5", trains[index], rate=rates[index])
        make_store(tmp_path / f"v{index}.h5", validations[index], subtask=subtask)
    config = load_config(
        options={
            "train_stores": [str(tmp_path / "t0.h5"), str(tmp_path / "t1.h5")],
            "eval_stores": [str(tmp_path / "v0.h5"), str(tmp_path / "v1.h5")],
            "weights": weights,
            "reduce": how,
            "output": str(tmp_path / "scores.jsonl"),
        }
    )
    records = [json.loads(line) for line in score(config).read_text().splitlines()]
    eta = {"lr": [0.75, 0.25], "uniform": [0.5, 0.5], "3,1": [0.75, 0.25]}[weights]
    np.testing.assert_allclose(
        [record["score"] for record in records], plain_formula(trains, validations, subtask, eta, how), atol=2e-6
    )
    assert [record["row"] for record in records] == list(range(0, 100, 2))
    assert set(records[0]["subtasks"]) == {"a", "b", "c"}
    one = plain_formula(trains, [v[[2, 3, 4]] for v in validations], list("bbb"), eta, "max")
    np.testing.assert_allclose([record["subtasks"]["b"] for record in records], one, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"proj_seed": 5}, r"proj_seed \(None against 5\)"),
        ({"projector": "rademacher"}, r"projector \(sketch against rademacher\)"),
        ({"adapter": "another"}, "adapter"),
        ({"parameters": [["p", 8]]}, "parameters"),
    ],
)
def test_stores_that_cannot_be_compared_are_refused(tmp_path, changes, words):
    rows = np.eye(4, K)
    make_store(tmp_path / "t.h5", rows)
    make_store(tmp_path / "v.h5", rows, **changes)
    config = load_config(
        options={
            "train_stores": str(tmp_path / "t.h5"),
            "eval_stores": str(tmp_path / "v.h5"),
            "output": str(tmp_path / "s"),
        }
    )
    with pytest.raises(UsageError, match=f"cannot be compared, they differ in .*{words}"):
        score(config)
    assert not (tmp_path / "s").exists()


def test_checkpoints_with_different_rows_are_refused(tmp_path):
    make_store(tmp_path / "t0.h5", np.eye(4, K))
    make_store(tmp_path / "t1.h5", np.eye(5, K))
    make_store(tmp_path / "v.h5", np.eye(2, K))
    stores = {"train_stores": f"{tmp_path}/t0.h5,{tmp_path}/t1.h5", "eval_stores": f"{tmp_path}/v.h5,{tmp_path}/v.h5"}
    with pytest.raises(UsageError, match="hold different rows"):
        score(load_config(options={**stores, "output": str(tmp_path / "s")}))
    with pytest.raises(UsageError, match="2 training stores and 1 validation stores"):
        score(load_config(options={**stores, "eval_stores": f"{tmp_path}/v.h5", "output": str(tmp_path / "s")}))


def test_weights():
    assert parse_weights("lr", [1e-4, 3e-4]) == pytest.approx([0.25, 0.75])
    assert parse_weights("0.6,0.4", [0, 0]) == pytest.approx([0.6, 0.4])
    for text in ("loud", "1", "1,2,3", "-1,2", "0,0", "nan,1"):
        with pytest.raises(UsageError, match="weights"):
            parse_weights(text, [1e-4, 3e-4])
    with pytest.raises(UsageError, match="learning rate is 0; use weights uniform"):
        parse_weights("lr", [0.0, 0.0])


def test_round_robin_takes_turns():
    values = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.2, 0.3, 0.4]])
    scores = round_robin(values)
    # subtask 0 takes row 0; 1 finds row 0 gone and takes 3; 0 takes 1; 1 takes 2
    assert ranking(np.arange(4), scores).tolist() == [0, 3, 1, 2]
    total, _ = influence([values, values], [0.5, 0.5], "round-robin", ["a", "b"])
    np.testing.assert_array_equal(total, scores)


def test_equal_scores_keep_row_order():
    assert ranking(np.array([9, 4, 7]), np.array([0.5, 0.5, 0.6])).tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int1"])
@pytest.mark.parametrize("packed", [False, True])
def test_stores_of_any_size_and_kind_are_scored_as_their_rows_are(tmp_path, monkeypatch, dtype, packed):
    """Several stripes and tiles, several subtasks, and a file that another program has compressed."""
    monkeypatch.setattr(stored, "STRIPE_ROWS", 7)
    monkeypatch.setattr(GradientStore.tiles, "__defaults__", (3 * K,))
    generator = np.random.default_rng(5)
    names = [["b", "a"][index % 2] for index in range(9)]
    train = make_store(tmp_path / "t.h5", generator.normal(size=(40, K)), dtype=dtype)
    validation = make_store(tmp_path / "v.h5", generator.normal(size=(9, K)), dtype=dtype, subtask=names)
    if packed:
        with h5py.File(train, "r+") as file:
            rows = file["gradients"][:]
            del file["gradients"]
            file.create_dataset("gradients", data=rows, compression="gzip")
    with open_store(train) as ours, open_store(validation) as theirs:
        subtasks, found, _ = stored.stored_cosines(ours, theirs)
        assert subtasks == ["a", "b"]
        wanted = [ours[:] @ theirs[index::2].mean(axis=0) for index in (1, 0)]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"row": 1}', "record 2"),
        ('{"row": -1, "score": 1}', "record 2"),
        ('{"row": true, "score": 1}', "record 2"),
        ('{"row": 3, "score": NaN}', "record 2"),
        ('{"row": 3, "score": 1' + 400 * "0" + "}", "record 2"),
        ('{"row": 3, "score": 1, "subtasks": {"a": null}}', "record 2"),
        ('{"row": 3, "score": 1, "subtasks": [1]}', "record 2"),
        ('{"row": 0, "score": 1}', "row 0 stands twice"),
        ("[1]", "line 2: expected an object"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_bad_score_file_names_its_line(tmp_path, line, words):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"row": 0, "score": 0.5}\n' + line + "\n")
    with pytest.raises(UsageError, match=words):
        read_scores(path)


def turns(values: np.ndarray) -> list[int]:
    """Round-robin by looking at every row that is left, each turn."""
    left, order = set(range(values.shape[1])), []
    while left:
        row = values[len(order) % len(values)]
        order.append(min(left, key=lambda index: (-row[index], index)))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize(
    ("queries", "count", "levels"), [(1, 50, 50), (3, 50, 4), (7, 3000, 5000), (5, 2500, 2), (4, 2, 9)]
)
def test_round_robin_is_a_turn_after_the_other(queries, count, levels):
    values = np.random.default_rng(count).integers(levels, size=(queries, count)).astype(np.float32)
    assert ranking(np.arange(count), round_robin(values)).tolist() == turns(values)


def test_standardised_rows_leave_nan_alone():
    values = np.array([[1, 2, np.nan, 6], [5, 5, 5, 5], [np.nan] * 4], dtype=np.float32)
    standardise(values)
    wanted = (np.array([1, 2, 6]) - 3) / np.std([1, 2, 6])
    np.testing.assert_allclose(values[0], [*wanted[:2], np.nan, wanted[2]], rtol=1e-6)
    assert values[1].tolist() == [0] * 4
    assert np.isnan(values[2]).all()


def slow_scores(trains, validations, subtask, weights, reduce, normalise, references) -> np.ndarray:
    """The formula of `normalise`, `contrast` and `reduce`, one cosine at a time in float64."""
    totals, summed = np.zeros((len(subtask), len(trains[0]))), np.zeros(len(trains[0]))
    names = sorted(set(subtask))
    for train, validation, weight, reference in zip(trains, validations, weights, references, strict=True):
        cosines = np.array([[float(row @ other) for row in unit(train)] for other in unit(validation)])
        if reference is not None:
            cosines -= np.array([np.mean([float(row @ other) for other in unit(reference)]) for row in unit(train)])
        if normalise:
            cosines = np.array([(row - row.mean()) / row.std() for row in cosines])
        totals += weight * cosines
        means = np.array([cosines[[name == s for s in subtask]].mean(axis=0) for name in names])
        summed += weight * (means.mean(axis=0) if reduce == "mean" else means.max(axis=0))
    if reduce in ("rows", "round-robin"):
        queries = totals
        if reduce == "round-robin":
            queries = np.array([totals[[name == s for s in subtask]].mean(axis=0) for name in names])
        summed = np.empty(len(trains[0]))
        summed[turns(queries)] = 1 - np.arange(len(summed)) / len(summed)
    return summed


@pytest.mark.parametrize("reduce", ["mean", "max", "round-robin", "rows"])
@pytest.mark.parametrize("normalise", [None, "rows"])
@pytest.mark.parametrize("contrast", [0, 3, "pool"])
def test_every_way_to_a_score_equals_the_slow_way(tmp_path, reduce, normalise, contrast):
    random = np.random.default_rng(1)
    trains, plain = ([random.normal(size=(30, K)) + 0.3 for _ in range(2)] for _ in range(2))
    validations = [random.normal(size=(6, K)) + 0.2 for _ in range(2)]
    reference = range(30) if contrast == "pool" else [4, 7, 20][:contrast]
    for index in range(2):
        make_store(tmp_path / f"v{index}.h5", validations[index], subtask=list("aabbba"))
        make_store(
            tmp_path / f"t{index}.h5",
            trains[index],
            rate=[3e-4, 1e-4][index],
            contrast=contrast,
            plain=plain[index][reference],
        )
    config = load_config(
        options={
            "train_stores": [str(tmp_path / "t0.h5"), str(tmp_path / "t1.h5")],
            "eval_stores": [str(tmp_path / "v0.h5"), str(tmp_path / "v1.h5")],
            "reduce": reduce,
            "normalise": normalise,
            "contrast": contrast,
            "output": str(tmp_path / "scores.jsonl"),
        }
    )
    records = [json.loads(line) for line in score(config).read_text().splitlines()]
    references = [rows[reference] if contrast else None for rows in plain]
    wanted = slow_scores(trains, validations, list("aabbba"), [0.75, 0.25], reduce, normalise, references)
    np.testing.assert_allclose([record["score"] for record in records], wanted, atol=5e-6)
    assert set(records[0]["subtasks"]) == {"a", "b"}


def test_contrast_needs_a_store_that_has_its_reference(tmp_path):
    make_store(tmp_path / "v.h5", np.eye(2, K))
    make_store(tmp_path / "t.h5", np.eye(4, K))
    make_store(tmp_path / "other.h5", np.eye(4, K), contrast=2, plain=np.eye(2, K))
    for name, words in (("t", "collected without contrast.*contrast=pool"), ("other", "contrast 2, not pool")):
        options = {
            "train_stores": str(tmp_path / f"{name}.h5"),
            "eval_stores": str(tmp_path / "v.h5"),
            "contrast": "pool",
        }
        with pytest.raises(UsageError, match=words):
            score(load_config(options={**options, "output": str(tmp_path / "s.jsonl")}))
        assert not (tmp_path / "s.jsonl").exists()


def test_sums_of_rows_may_be_in_a_file(tmp_path, monkeypatch):
    """What validation rows' turns come to does not depend on where their sums are."""
    generator = np.random.default_rng(0)
    cosines = [generator.normal(size=(7, 50)).astype(np.float32) for _ in range(3)]
    cosines[0][2] = np.nan  # a validation row without a gradient
    weights, labels = [0.5, 0.3, 0.2], list("aababba")
    score, by_subtask = influence(cosines, weights, "rows", labels, tmp_path)
    monkeypatch.setattr("dataflex.files.MAX_IN_MEMORY", 0)
    in_file, by_subtask_in_file = influence(cosines, weights, "rows", labels, tmp_path)
    np.testing.assert_array_equal(in_file, score)
    total = sum(weight * values.astype(np.float64) for weight, values in zip(weights, cosines, strict=True))
    left, wanted = set(range(50)), []
    while left:
        for row in total[[0, 1, 3, 4, 5, 6]]:
            if left:
                wanted.append(max(left, key=lambda index, row=row: row[index]))
                left.remove(wanted[-1])
    assert np.argsort(-score).tolist() == wanted
    for name in "ab":
        of = [index for index, label in enumerate(labels) if label == name and index != 2]
        np.testing.assert_allclose(by_subtask[name], total[of].mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(by_subtask[name], by_subtask_in_file[name])


def test_a_row_is_won_by_the_subtask_for_which_it_scores_highest() -> None:
    nan = float("nan")
    subtasks = {"a": [0.1, 0.9, 0.4, nan, nan], "b": [0.3, 0.2, 0.4, nan, 0.0], "c": [0.0, 0.1, 0.0, nan, nan]}
    scores = Scores(np.arange(5) + 10, np.zeros(5), {name: np.array(values) for name, values in subtasks.items()})
    by_hand = {"a": (2, 1), "b": (2, 2), "c": (0, 1)}  # row 2 is equal for a and b, row 3 is no subtask's
    assert winners(scores) == by_hand


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    subtasks = {name: generator.normal(size=7) for name in ("a", "b")}
    written = Scores(np.arange(7) * 3, generator.normal(size=7), subtasks, ["d", "e"] * 3 + ["d"])
    write_scores(written, tmp_path / "scores.jsonl")
    found = read_scores(tmp_path / "scores.jsonl")
    assert found.row.tolist() == written.row.tolist() and found.score.tolist() == written.score.tolist()
    assert {name: values.tolist() for name, values in found.subtasks.items()} == {
        name: values.tolist() for name, values in subtasks.items()
    }
    assert found.dataset == written.dataset
    assert winners(found) == winners(written)
