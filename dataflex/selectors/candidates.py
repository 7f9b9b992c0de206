"""Which rows a selection scores anew, where `candidates` asks for a share of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RANDOM_PART = 0.1
"""Share of the candidates that is drawn at random."""


@dataclass(frozen=True)
class Candidates:
    """The rows of a pool that are scored anew."""

    best: np.ndarray
    """Indices of the rows with the best scores so far, ascending."""
    drawn: np.ndarray
    """Indices of rows drawn at random from the others, ascending."""
    pool: int
    """Rows of the pool."""

    @property
    def indices(self) -> np.ndarray:
        """All candidates, ascending."""
        return np.sort(np.concatenate([self.best, self.drawn]))

    @property
    def weights(self) -> np.ndarray:
        """[candidates] with which their mean estimates a mean over the pool, in the order of `indices`.

        A row of `best` stands for itself, a drawn row for its part of the others: a stratified sample.
        """
        others = self.pool - len(self.best)
        by_row = np.ones(self.pool)
        by_row[self.drawn] = others / max(1, len(self.drawn))
        return by_row[self.indices]


def choose_candidates(scores: np.ndarray, share: float, generator: np.random.Generator) -> Candidates:
    """The `share` of a pool that is scored anew: the rows with the best scores so far, and a tenth at random.

    Args:
        scores: [N] the last scores; NaN for a row that has none, which can only be drawn.
    """
    count = max(1, round(share * len(scores)))
    drawn_count = max(1, round(RANDOM_PART * count)) if count > 1 else 0
    order = np.argsort(-scores, kind="stable")  # NaN last
    best = np.sort(order[: min(count - drawn_count, int(np.isfinite(scores).sum()))])
    others = np.setdiff1d(np.arange(len(scores)), best, assume_unique=True)
    drawn = np.sort(generator.permutation(others)[: count - len(best)])
    return Candidates(best, drawn, len(scores))


def carry_back(earlier: np.ndarray, later: np.ndarray, known: np.ndarray, anew: np.ndarray) -> np.ndarray:
    """The cosines `earlier` [Q, N], with those of rows that were not `known` [N] then predicted from `later` [Q, N].

    As training goes on, all cosines rise: a later one in an earlier one's place would put a row ahead of all that were
    known from the start. The prediction is the least-squares line through the rows that were known then and were scored
    `anew` [N] later; where all of these have one later cosine, or there is none, their mean change is added.
    """
    filled = earlier.copy()
    for row, after in zip(filled, later.astype(np.float64), strict=True):
        both = known & anew & np.isfinite(row) & np.isfinite(after)
        x, y = after[both], row[both].astype(np.float64)
        if not len(x):
            row[~known] = after[~known]
            continue
        spread = x - x.mean()
        slope = spread @ y / (spread @ spread) if np.ptp(x) > 0 else 1.0
        row[~known] = y.mean() + slope * (after[~known] - x.mean())
    return filled
