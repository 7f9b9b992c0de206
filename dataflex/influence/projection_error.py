"""How far the error of a projection blurs scores, estimated from the projected gradients alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from dataflex.influence.scores import weighted_sum
from dataflex.influence.stored import StoredCosines
from dataflex.store.manifest import Manifest

ENOUGH_ROWS = 30
"""Fewer rows say nothing of their spread."""
FAITHFUL = 0.9
"""A lower correlation with exact scores is worth a warning."""


def halves_of_scores(found: StoredCosines, how: str) -> np.ndarray | None:
    """[2, N]: what either half of a projection's numbers adds to each row's score at one checkpoint.

    Args:
        how: `mean` or `max` over subtasks; of `max` the halves are those of the subtask that is highest, so that an
            estimate from them is low where errors decide which that is.

    Returns:
        None where nothing was projected, and for any other `how`: a turn's place has no halves.
    """
    if found.first_half is None or how not in ("mean", "max"):
        return None
    if how == "mean":
        whole, first = (values.mean(axis=0) for values in (found.values, found.first_half))
    else:
        highest = found.values.argmax(axis=0)[None]
        whole, first = (np.take_along_axis(of, highest, axis=0)[0] for of in (found.values, found.first_half))
    return np.stack([first, whole - first])


def projection_correlation(halves: Sequence[np.ndarray | None], weights: Sequence[float]) -> float | None:
    """Pearson's correlation of scores from projected gradients with those from whole ones, estimated; 0 to 1.

    Each half of a projection's k numbers gives every row a score of its own, with an error of its own, and both add up
    to the row's score. Their difference then varies as the error of the score does, and
    r² = 1 − Var(a − b) / Var(a + b) is the share of the scores' variance that is no error (Guttman's λ4, Psychometrika
    10, 1945). EVIDENCE.md has estimates beside what was measured. Rounding to few bits counts as error as well.

    Args:
        halves: for each checkpoint [2, N] a and b, NaN for a row without a score; None where there are none.
        weights: η̄ of each checkpoint.

    Returns:
        None where a checkpoint has no halves, for fewer than ENOUGH_ROWS rows, or where all scores are the same.
    """
    known = [held for held in halves if held is not None]
    if len(known) < len(halves):
        return None
    total = weighted_sum(weights, known)
    first, second = total[:, np.isfinite(total).all(axis=0)]
    variance = (first + second).var() if len(first) >= ENOUGH_ROWS else 0.0
    if variance == 0:
        return None
    return float(np.sqrt(max(0.0, 1 - (first - second).var() / variance)))


def warn_of_projection(correlation: float | None, manifest: Manifest) -> None:
    """Warn of scores from a store that the projection blurs; of faithful ones, or where nothing is known, do not."""
    if correlation is None or correlation >= FAITHFUL:
        return
    dtype = manifest.store_dtype
    kept = f"{manifest.proj_dim} numbers" + (f", kept as {dtype}," if dtype.startswith("int") else "")
    warnings.warn(
        f"the projection to {kept} blurs the gradients' scores: their correlation with those of whole gradients is "
        f"about {correlation:.2f}; a larger proj_dim blurs less, proj_dim: null not at all",
        stacklevel=2,
    )
