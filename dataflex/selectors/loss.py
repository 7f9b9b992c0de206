"""`component_name: loss`: rows by their loss at the current parameters."""

from __future__ import annotations

import numpy as np

from dataflex.gradients.passes import forward_rows, gathered_rows, losses_of
from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Situation


class LossSelector:
    """The rows of `loss_band`: the highest losses, those nearest the median, or the lowest."""

    def score(self, situation: Situation) -> Scores:
        capture, examples = situation.capture, situation.train.examples
        rows = forward_rows(capture, examples, losses_of(capture), situation.progress, "train losses")
        losses = gathered_rows(rows, np.empty(len(examples), dtype=np.float32)).astype(np.float64)
        return situation.scores(band_scores(losses, situation.config.loss_band))


def band_scores(losses: np.ndarray, band: str) -> np.ndarray:
    """[N] losses to [N] scores: the loss for `high`, minus its distance to the median for `medium`, minus the loss for
    `low`."""
    if band == "medium":
        return -np.abs(losses - np.median(losses))
    return losses if band == "high" else -losses
