"""`component_name: less`: rows whose Adam step points where the validation gradient points (arXiv 2402.04333)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from dataflex import processes
from dataflex.config import needed
from dataflex.files import atomic
from dataflex.gradients.collect import collect
from dataflex.gradients.direction import make_direction
from dataflex.influence.exact import exact_cosines
from dataflex.influence.scores import Scores, influence, normalise_weights
from dataflex.influence.stored import open_pairs, stored_cosines
from dataflex.selectors.protocol import Situation


class LessSelector:
    """Scores sum over the selections so far. Each selection leaves its cosines on disk for the next ones, so that a
    resumed run remembers as much as a run that never stopped."""

    def score(self, situation: Situation) -> Scores:
        config = situation.config
        names, cosines = _exact(situation) if config.is_exact else _stored(situation)
        _remember(situation, cosines)
        steps = [*situation.past_steps, situation.moments.step] if config.accumulate else [situation.moments.step]
        past = [_recall(situation.memory, step) for step in steps]
        weights = normalise_weights([learning_rate for _, learning_rate in past])
        score, by_subtask = influence([values for values, _ in past], weights, config.reduce)
        return situation.scores(score, dict(zip(names, by_subtask, strict=True)))


def _remember(situation: Situation, cosines: np.ndarray) -> None:
    """Write this selection's cosines [S, N] and learning rate; atomic."""
    if processes.rank() == 0:
        rate = {"learning_rate": repr(situation.moments.learning_rate)}
        with atomic(situation.memory / f"step-{situation.moments.step}.safetensors", "wb") as handle:
            handle.write(save({"cosines": np.ascontiguousarray(cosines)}, metadata=rate))
    processes.barrier()


def _recall(memory: Path, step: int) -> tuple[np.ndarray, float]:
    with safe_open(memory / f"step-{step}.safetensors", framework="np") as file:
        return file.get_tensor("cosines"), float(file.metadata()["learning_rate"])


def _exact(situation: Situation) -> tuple[list[str], np.ndarray]:
    config, capture = situation.config, situation.capture
    return exact_cosines(
        capture,
        situation.train.examples,
        situation.validation.examples,
        make_direction(config.gradient_type, config.adam_formula, situation.moments, capture.slots),
        make_direction(config.eval_gradient_type, config.adam_formula, situation.moments, capture.slots),
        situation.progress,
        config.skip_bad_rows,
    )


def _stored(situation: Situation) -> tuple[list[str], np.ndarray]:
    paths = []
    for name, split in (("eval", situation.validation), ("train", situation.train)):
        path = situation.cache / f"{name}.h5"
        collect(
            situation.config, situation.capture, split, name, situation.moments, path, situation.progress, cache=True
        )
        paths.append(path)
    found: tuple[list[str], np.ndarray] | None = None
    if processes.rank() == 0:
        [(train, validation)] = open_pairs([paths[1]], [paths[0]])
        with train, validation:
            found = stored_cosines(train, validation, situation.progress)
    return needed(processes.broadcast(found))
