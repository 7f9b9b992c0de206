"""Random rows: what a selector must beat."""

from __future__ import annotations

import numpy as np

from dataflex.influence.scores import Scores, scores_of
from dataflex.selectors import Situation


class RandomSelector:
    """Every row's score is a uniform random number, drawn anew at each selection from `seed` and the step."""

    def score(self, situation: Situation) -> Scores:
        generator = np.random.default_rng((situation.config.seed, 2, situation.moments.step))
        examples = situation.train.examples
        numbers = generator.random(len(examples))
        return scores_of(examples, len(situation.config.dataset) > 1, [], numbers, np.empty((0, len(numbers))))
