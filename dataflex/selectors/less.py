"""LESS: rows whose Adam step points where the validation gradient points (arXiv 2402.04333)."""

from __future__ import annotations

import numpy as np

from dataflex.gradients.collect import collect
from dataflex.gradients.direction import make_direction
from dataflex.influence.exact import exact_cosines
from dataflex.influence.scores import Scores, influence, normalise_weights, scores_of
from dataflex.influence.stored import open_pairs, stored_cosines
from dataflex.selectors import Situation


class LessSelector:
    """Remembers the cosines of former selections, so that scores can sum over them."""

    def __init__(self) -> None:
        self._cosines: list[np.ndarray] = []
        self._learning_rates: list[float] = []

    def score(self, situation: Situation) -> Scores:
        config = situation.config
        names, cosines = _exact(situation) if config.is_exact else _stored(situation)
        if not config.accumulate:
            self._cosines.clear()
            self._learning_rates.clear()
        self._cosines.append(cosines)
        self._learning_rates.append(situation.moments.learning_rate)
        score, by_subtask = influence(self._cosines, normalise_weights(self._learning_rates), config.reduce)
        return scores_of(situation.train.examples, len(config.dataset) > 1, names, score, by_subtask)


def _exact(situation: Situation) -> tuple[list[str], np.ndarray]:
    config, run = situation.config, situation.run
    return exact_cosines(
        run,
        situation.train.examples,
        situation.validation.examples,
        make_direction(config.gradient_type, config.adam_formula, situation.moments, run.slots),
        make_direction(config.eval_gradient_type, config.adam_formula, situation.moments, run.slots),
        situation.progress,
    )


def _stored(situation: Situation) -> tuple[list[str], np.ndarray]:
    paths = []
    for name, split in (("eval", situation.validation), ("train", situation.train)):
        path = situation.folder / f"{name}.h5"
        collect(situation.config, situation.run, split, name, situation.moments, path, situation.progress)
        paths.append(path)
    [(train, validation)] = open_pairs([paths[1]], [paths[0]])
    with train, validation:
        return stored_cosines(train, validation, situation.progress)
