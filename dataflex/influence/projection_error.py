"""How far the error of a projection blurs scores, estimated from the projected gradients alone."""

from __future__ import annotations

import numpy as np

ENOUGH_ROWS = 30
"""Fewer rows say nothing of their spread."""
FAITHFUL = 0.9
"""A lower correlation with exact scores is worth a warning."""


def halves_of_scores(values: np.ndarray, first: np.ndarray, how: str) -> np.ndarray | None:
    """[2, N]: what either half of a projection's numbers adds to each row's score.

    Args:
        values: [S, N] mean cosines with each subtask's rows.
        first: [S, N] the part of them that the first half of the numbers adds.
        how: `mean` or `max` over subtasks; of `max` the halves are those of the subtask that is highest, so that an
            estimate from them is low where errors decide which that is. None for anything else: a turn's place has no
            halves.
    """
    if how == "mean":
        whole, part = values.mean(axis=0), first.mean(axis=0)
    elif how == "max":
        highest = values.argmax(axis=0)[None]
        whole, part = (np.take_along_axis(of, highest, axis=0)[0] for of in (values, first))
    else:
        return None
    return np.stack([part, whole - part])


def projection_correlation(halves: np.ndarray) -> float | None:
    """Pearson's correlation of scores from projected gradients with those from whole ones, estimated; 0 to 1.

    Each half of a projection's k numbers gives every row a score of its own, with an error of its own, and both add up
    to the row's score. Their difference then varies as the error of the score does, and
    r² = 1 − Var(a − b) / Var(a + b) is the share of the scores' variance that is no error (Guttman's λ4, Psychometrika
    10, 1945). EVIDENCE.md has estimates beside what was measured. Rounding to few bits counts as error as well.

    Args:
        halves: [2, N] a and b; NaN for a row without a score.

    Returns:
        None for fewer than ENOUGH_ROWS rows, or where all scores are the same.
    """
    first, second = halves[:, np.isfinite(halves).all(axis=0)].astype(np.float64)
    total = (first + second).var() if len(first) >= ENOUGH_ROWS else 0.0
    if total == 0:
        return None
    return float(np.sqrt(max(0.0, 1 - (first - second).var() / total)))


def projection_warning(correlation: float | None, dim: int, store_dtype: str) -> str | None:
    """What to say of scores from projections to `dim` numbers; None where they are faithful, or nothing is known."""
    if correlation is None or correlation >= FAITHFUL:
        return None
    kept = f"{dim} numbers" + (f", kept as {store_dtype}," if store_dtype.startswith("int") else "")
    return (
        f"the projection to {kept} blurs the gradients' scores: their correlation with those of whole gradients is "
        f"about {correlation:.2f}; a larger proj_dim blurs less, proj_dim: null not at all"
    )
