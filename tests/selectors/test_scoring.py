"""What a selector may give back, and what is said of anything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex import dynamic, load_config
from dataflex.data.rows import Example
from dataflex.errors import DataflexError, UsageError
from dataflex.influence.scores import Scores
from dataflex.selectors.candidates import carry_back
from dataflex.selectors.protocol import Situation
from dataflex.selectors.scoring import score_rows

ROWS = [3, 4, 9]


@pytest.fixture
def situation(tmp_path: Path) -> Situation:
    """Three training rows; what a selector of this file does not look at is left out."""
    examples = [Example(row, [1, 2], [-100, 2], None, "data") for row in ROWS]
    split = SimpleNamespace(examples=examples)
    config = load_config(options={"dataset": "data", "selector": "my.own:Selector"})
    return Situation(config, None, split, None, lambda: None, None, 0, tmp_path, tmp_path, [], None)


def giving(result: Callable[[Situation], Any]) -> Any:
    return SimpleNamespace(score=result)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        np.array([1, 2, 3], dtype=np.uint8),
        np.array([1, 2, 3], dtype=np.float16),
        [1.5, np.nan, -2],
    ],
)
def test_real_numbers_become_float64(values, situation):
    scores = score_rows(giving(lambda situation: situation.scores(values, {"x": values})), situation)
    assert scores.score.dtype == scores.subtasks["x"].dtype == np.float64
    np.testing.assert_array_equal(scores.score, np.array(values, dtype=np.float64))
    assert scores.row.tolist() == ROWS
    assert scores.dataset is None


WRONG = {
    "None": (lambda s: None, r"returned a NoneType; expected Scores: return situation\.scores"),
    "array": (lambda s: np.zeros(3), r"returned a ndarray; expected Scores"),
    "too few": (
        lambda s: s.scores([1.0, 2]),
        r"score is an array of float64 of shape \[2\]; expected 3 real numbers, one for each",
    ),
    "too many": (lambda s: s.scores(np.zeros(4)), r"of shape \[4\]; expected 3 real numbers"),
    "matrix": (lambda s: s.scores(np.zeros((3, 1))), r"of shape \[3, 1\]; expected"),
    "scalar": (lambda s: s.scores(1.0), r"of shape \[\]; expected"),
    "booleans": (lambda s: s.scores([True, False, True]), r"an array of bool of shape"),
    "texts": (lambda s: s.scores(["a", "b", "c"]), r"an array of <U1 of shape"),
    "complex": (lambda s: s.scores([1j, 2, 3]), r"an array of complex128"),
    "unequal lists": (
        lambda s: s.scores([[1], [2, 3], 4]),
        r"score is a list that is no array \(.*\); expected 3 real",
    ),
    "by hand": (lambda s: Scores(np.array(ROWS), np.zeros(2), {}), r"score is an array of float64 of shape \[2\]; exp"),
    "objects": (lambda s: s.scores([None, 2, 3]), r"an array of object"),
    "all NaN": (lambda s: s.scores([np.nan] * 3), r"the scores of all 3 rows are NaN; expected numbers"),
    "infinite": (lambda s: s.scores([1, -np.inf, np.inf]), r"the score of row 4 is -inf; expected a finite number"),
    "subtask": (lambda s: s.scores([1, 2, 3], {"x": [1, 2]}), r"subtask 'x' is an array of int64 of shape \[2\]"),
    "other rows": (
        lambda s: replace(s.scores([1, 2, 3]), row=np.array([4, 3, 9])),
        r"the rows of its scores are not the training rows in their order",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_refused_by_the_selectors_name(case, situation):
    result, message = WRONG[case]
    with pytest.raises(DataflexError, match=message) as raised:
        score_rows(giving(result), situation)
    assert not isinstance(raised.value, UsageError)
    assert str(raised.value).startswith("selector 'my.own:Selector'")


EACH_ITS_OWN = """
from types import SimpleNamespace
from dataflex import load_config, processes
from dataflex.data.rows import Example
from dataflex.selectors.candidates import carry_back
from dataflex.selectors.protocol import Situation
from dataflex.selectors.scoring import score_rows

processes.join(60, False)
split = SimpleNamespace(examples=[Example(row, [1], [1], None, "data") for row in range(3)])
situation = Situation(load_config(), None, split, None, None, None, 0, None, None, [], None)
selector = SimpleNamespace(score=lambda situation: situation.scores([processes.rank(), 5, 7]))
print(score_rows(selector, situation).score.tolist())
processes.leave()
"""


def test_processes_that_score_differently_take_the_first_ones_scores(in_two_processes):
    """Rows are shared out by every process from its own copy of the selection, so the copies must be equal."""
    assert in_two_processes(EACH_ITS_OWN) == ["[0.0, 5.0, 7.0]"] * 2


def test_a_run_ends_with_the_message(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "gives_too_few.py").write_text(
        "class Few:\n    def score(self, situation):\n        return situation.scores([0.5])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {**tiny_run, "component_name": "gives_too_few:Few", "output_dir": str(tmp_path / "out")}
    with pytest.raises(
        DataflexError, match=r"^selector 'gives_too_few:Few': score is an array of .* expected 24 real numbers"
    ):
        dynamic(load_config(options=options))


def test_cosines_of_rows_that_were_not_known_are_predicted():
    """On a straight line between two selections the prediction is exact; later cosines alone would come out ahead."""
    later = np.linspace(0.1, 0.3, 8, dtype=np.float32)[None]
    truth = 2 * later - 0.2
    known, anew = np.arange(8) % 2 == 0, np.arange(8) != 4
    earlier = np.where(known, truth, np.nan).astype(np.float32)
    earlier[0, 4] = 9  # carried over, not scored later: it has no part
    filled = carry_back(earlier, later, known, anew)
    np.testing.assert_allclose(filled[0, ~known], truth[0, ~known], atol=1e-6)
    np.testing.assert_array_equal(filled[0, known], earlier[0, known])
    np.testing.assert_allclose(carry_back(earlier, later, known, known & False)[0, ~known], later[0, ~known])
    flat = np.full((1, 8), 0.5, dtype=np.float32)
    np.testing.assert_allclose(carry_back(truth, flat, known, anew)[0, ~known], truth[0, known & anew].mean())
