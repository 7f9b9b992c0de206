"""From the losses of the arms to differences, intervals and correlations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataflex.influence.scores import rank_correlation

RESAMPLES = 4000
LEVEL = 0.95


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The mean of ours − theirs, and its bootstrap interval at LEVEL.

    Args:
        ours: [seeds, rows] losses of held-out rows.
        theirs: [seeds, rows] those of the arm that is compared with, after training from the same start: row by row and
            seed by seed they are pairs.

    Each resample draws seeds and rows anew, both with replacement, so the interval holds for other seeds and for other
    rows of the target (the percentile bootstrap of Efron over two crossed factors). With one seed it holds for other
    rows alone.
    """
    pairs = ours - theirs
    generator = np.random.default_rng(0)
    seeds, rows = pairs.shape
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        # a resample's mean is w'Dv, where w and v are the shares in which each seed and each row was drawn
        of_seeds, of_rows = (generator.multinomial(count, np.full(count, 1 / count)) / count for count in (seeds, rows))
        means[number] = of_seeds @ pairs @ of_rows
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"difference": float(pairs.mean()), "low": float(low), "high": float(high)}


def agreement(picks: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]]) -> float:
    """The share of rows that two arms both picked, of the rows of the smaller pick; the mean over seeds."""
    shares = [
        len({*ours} & {*theirs}) / min(len(ours), len(theirs)) for ours, theirs in zip(picks, others, strict=True)
    ]
    return float(np.mean(shares))


def decile_test(loss: np.ndarray) -> dict[str, Any]:
    """Of the held-out losses [seeds, 10] after training on each tenth of a ranking, best first: their means, Spearman's
    correlation of a tenth's place with its mean loss, and the correlation of each seed. 1: every better tenth gives the
    lower loss. 0: the ranking says nothing."""
    place = np.arange(loss.shape[1], dtype=float)
    return {
        "loss": loss.mean(axis=0).tolist(),
        "spearman": rank_correlation(place, loss.mean(axis=0)),
        "by_seed": [rank_correlation(place, of_seed) for of_seed in loss],
    }


def datamodeling_score(scores: np.ndarray, halves: Sequence[np.ndarray], loss: np.ndarray) -> float | None:
    """The linear datamodeling score (Park et al., TRAK, ICML 2023): Spearman's correlation, over random subsets, of the
    sum of a subset's scores with the held-out loss after training on it, its sign turned. 1: scores foretell which
    subset trains better.

    Args:
        scores: [N] of the pool; NaN counts as 0.
        halves: the indices of each subset.
        loss: [subsets] mean over held-out rows.
    """
    foretold = np.array([np.nansum(scores[half]) for half in halves])
    return rank_correlation(foretold, -loss)
