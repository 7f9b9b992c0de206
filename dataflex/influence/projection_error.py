"""How far the error of a projection blurs scores, estimated from the projected gradients alone."""

from __future__ import annotations

import numpy as np

ENOUGH_ROWS = 30
"""Fewer rows say nothing of their spread."""
FAITHFUL = 0.9
"""A lower correlation with exact scores is worth a warning."""


def exact_correlation(halves: np.ndarray) -> float | None:
    """Pearson's correlation of mean cosines of projected gradients with those of whole gradients, estimated; 0 to 1.

    Each half of a projection's k numbers gives every row a score of its own, with an error of its own, and both add up
    to the row's score. Their difference then varies as the error of the score does, and
    r² = 1 − Var(a − b) / Var(a + b) is the share of the scores' variance that is no error (Guttman's λ4, Psychometrika
    10, 1945). EVIDENCE.md has estimates beside what was measured.

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


def projection_warning(correlation: float | None, dim: int) -> str | None:
    """What to say of scores from projections to `dim` numbers; None where they are faithful, or nothing is known."""
    if correlation is None or correlation >= FAITHFUL:
        return None
    return (
        f"the projection to {dim} numbers blurs these scores: the correlation of mean cosines with those of whole "
        f"gradients is about {correlation:.2f}; a larger proj_dim blurs less, proj_dim: null not at all"
    )
