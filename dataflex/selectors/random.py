"""`component_name: random`: what a selector must beat."""

from __future__ import annotations

import numpy as np

from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Situation


class RandomSelector:
    """Every row's score is a uniform random number, drawn anew at each selection from `seed` and the step."""

    def score(self, situation: Situation) -> Scores:
        generator = np.random.default_rng((situation.config.seed, 2, situation.step))
        return situation.scores(generator.random(len(situation.train.examples)))
