"""Asking a selector for its scores, and checking them: a selector may be anyone's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dataflex import processes
from dataflex.data.rows import row_numbers
from dataflex.errors import DataflexError
from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Selector, Situation, one_number_a_row


def score_rows(selector: Selector, situation: Situation) -> Scores:
    """The selector's scores as float64; the first process's scores in every process.

    Raises:
        DataflexError: naming the selector, where it does not give one number to each training row.
    """
    name = situation.config.selector
    scores = check_scores(name, selector.score(situation), situation)
    return replace(scores, score=processes.broadcast(scores.score))


def check_scores(name: str, scores: object, situation: Situation) -> Scores:
    """`scores` with float64 numbers, if the selector `name` could return them; a DataflexError otherwise."""
    if not isinstance(scores, Scores):
        raise DataflexError(
            f"selector {name!r} returned a {type(scores).__name__}; expected Scores: return situation.scores(...)"
        )
    expected = row_numbers(situation.train.examples)
    score = one_number_a_row(f"selector {name!r}: score", scores.score, len(expected))
    if not np.array_equal(scores.row, expected):
        raise DataflexError(
            f"selector {name!r}: the rows of its scores are not the training rows in their order; "
            "return situation.scores(...)"
        )
    if np.isnan(score).all():
        raise DataflexError(f"selector {name!r}: the scores of all {len(score)} rows are NaN; expected numbers")
    if np.isinf(score).any():
        index = int(np.flatnonzero(np.isinf(score))[0])
        raise DataflexError(
            f"selector {name!r}: the score of row {expected[index]} is {score[index]}; expected a finite number, or "
            "NaN for a row that is not to be taken"
        )
    subtasks = {
        subtask: one_number_a_row(f"selector {name!r}: subtask {subtask!r}", values, len(expected))
        for subtask, values in scores.subtasks.items()
    }
    return replace(scores, score=score, subtasks=subtasks)
