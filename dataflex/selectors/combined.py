"""`component_name: a+b`: several selectors at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Selector, Situation


class CombinedSelector:
    """The mean of the selectors' scores, each standardised over the training rows."""

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self.selectors = list(selectors)

    def score(self, situation: Situation) -> Scores:
        parts = [selector.score(situation) for selector in self.selectors]
        return situation.scores(combine([part.score for part in parts]))


def combine(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The mean [N] of several scores [N], each standardised over the rows that have all of them.

    The other rows have NaN. A score that is one number throughout counts as 0.
    """
    stacked = np.array(scores, dtype=np.float64)
    good = ~np.isnan(stacked).any(axis=0)
    out = np.full(stacked.shape[1], np.nan)
    present = stacked[:, good]
    spread = present.std(axis=1, keepdims=True)
    centred = present - present.mean(axis=1, keepdims=True)
    out[good] = np.divide(centred, spread, out=np.zeros_like(present), where=spread > 0).mean(axis=0)
    return out
