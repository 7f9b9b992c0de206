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
from dataflex.gradients.reference import reference_rows
from dataflex.influence.exact import exact_cosines
from dataflex.influence.pairs import open_pairs
from dataflex.influence.scores import Scores, influence, normalise_weights, settle
from dataflex.influence.stored import stored_cosines
from dataflex.selectors.protocol import Situation


class LessSelector:
    """Scores sum over the selections so far. Each selection leaves its cosines on disk for the next ones, so that a
    resumed run remembers as much as a run that never stopped."""

    def score(self, situation: Situation) -> Scores:
        config = situation.config
        labels, cosines = _exact(situation) if config.is_exact else _stored(situation)
        if config.per_row:
            labels, cosines = settle(labels, cosines, config.normalise, config.reduce)
        _remember(situation, cosines)
        steps = [*situation.past_steps, situation.step] if config.accumulate else [situation.step]
        past = [_recall(situation.memory, step) for step in steps]
        weights = normalise_weights([learning_rate for _, learning_rate in past])
        score, by_subtask = influence([values for values, _ in past], weights, config.reduce, labels)
        return situation.scores(score, by_subtask)


def _remember(situation: Situation, cosines: np.ndarray) -> None:
    """Write this selection's cosines [S, N] and learning rate; atomic."""
    if processes.rank() == 0:
        rate = {"learning_rate": repr(needed(situation.moments).learning_rate)}
        with atomic(situation.memory / f"step-{situation.step}.safetensors", "wb") as handle:
            handle.write(save({"cosines": np.ascontiguousarray(cosines)}, metadata=rate))
    processes.barrier()


def _recall(memory: Path, step: int) -> tuple[np.ndarray, float]:
    with safe_open(memory / f"step-{step}.safetensors", framework="np") as file:
        return file.get_tensor("cosines"), float(file.metadata()["learning_rate"])


def _exact(situation: Situation) -> tuple[list[str], np.ndarray]:
    config, capture = situation.config, situation.capture
    train = situation.train.examples
    train_direction, validation_direction = (
        make_direction(kind, config.adam_formula, situation.moments, capture.slots, config.marginal)
        for kind in (config.gradient_type, config.eval_gradient_type)
    )
    return exact_cosines(
        capture,
        train,
        situation.validation.examples,
        train_direction,
        validation_direction,
        situation.progress,
        config.skip_bad_rows,
        per_row=config.per_row,
        reference=[train[index] for index in reference_rows(config, len(train))],
        scratch=situation.memory,
    )


def _stored(situation: Situation) -> tuple[list[str], np.ndarray]:
    config = situation.config
    paths = []
    for name, split in (("eval", situation.validation), ("train", situation.train)):
        path = situation.cache / f"{name}.h5"
        collect(config, situation.capture, split, name, situation.moments, path, situation.progress, cache=True)
        paths.append(path)
    found: tuple[list[str], np.ndarray] | None = None
    if processes.rank() == 0:
        [(train, validation)] = open_pairs([paths[1]], [paths[0]])
        with train, validation:
            found = stored_cosines(
                train,
                validation,
                situation.progress,
                per_row=config.per_row,
                contrast=config.contrast != 0,
                scratch=situation.cache,
            )
    return needed(processes.broadcast(found))
