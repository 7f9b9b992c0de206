"""`component_name: less`: rows whose Adam step points where the validation gradient points (arXiv 2402.04333)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from dataflex import processes
from dataflex.config import needed
from dataflex.data.examples import part_of
from dataflex.files import atomic
from dataflex.gradients.collect import collect
from dataflex.gradients.direction import make_direction
from dataflex.gradients.reference import reference_weights
from dataflex.influence.exact import exact_cosines
from dataflex.influence.pairs import open_pairs
from dataflex.influence.projection_error import halves_of_scores, projection_correlation, warn_of_projection
from dataflex.influence.scores import Scores, influence, normalise_weights, settle
from dataflex.influence.stored import stored_cosines
from dataflex.selectors.candidates import Candidates, carry_back, choose_candidates
from dataflex.selectors.protocol import Situation
from dataflex.selectors.table import make_selector, parts_of


class LessSelector:
    """Scores sum over the selections so far. Each selection leaves its cosines on disk for the next ones, so that a
    resumed run remembers as much as a run that never stopped."""

    def score(self, situation: Situation) -> Scores:
        config = situation.config
        past = [_recall(situation.memory, step) for step in situation.past_steps]
        chosen = _candidates(situation, past)
        labels, cosines = (_exact if config.is_exact else _stored)(situation, chosen)
        if config.per_row:
            labels, cosines = settle(labels, cosines, config.normalise, config.reduce)
        scored = np.ones(cosines.shape[1], dtype=bool)
        now = _Selection(labels, cosines, scored, scored, needed(situation.moments).learning_rate)
        if chosen is not None:
            now = now.spread_over(chosen, past[-1] if past else None)
        _remember(situation, now)
        return situation.scores(*_accumulated([*past, now], situation))


@dataclass(frozen=True)
class _Selection:
    """What a selection found of the whole pool."""

    labels: list[str]
    """[Q] the subtask of each of `cosines`."""
    cosines: np.ndarray
    """[Q, N] float32; NaN for a bad row, and for one that no selection has scored."""
    known: np.ndarray
    """[N] bool: rows that this or an earlier selection has scored."""
    anew: np.ndarray
    """[N] bool: rows that this selection has scored."""
    learning_rate: float

    def spread_over(self, chosen: Candidates, before: _Selection | None) -> _Selection:
        """These cosines of the candidates among the last ones of the other rows."""
        cosines = np.full((len(self.cosines), chosen.pool), np.nan, dtype=np.float32)
        known = np.zeros(chosen.pool, dtype=bool)
        if before is not None:
            cosines[:], known[:] = before.cosines, before.known
        cosines[:, chosen.indices] = self.cosines
        anew = np.zeros(chosen.pool, dtype=bool)
        anew[chosen.indices] = True
        return _Selection(self.labels, cosines, known | anew, anew, self.learning_rate)


def _accumulated(selections: list[_Selection], situation: Situation) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores [N] and by subtask, summed over the selections. A row that was first scored later has predicted cosines at
    the selections before."""
    config = situation.config
    selections = selections if config.accumulate else selections[-1:]
    filled = [selections[-1].cosines]
    for selection, later in zip(selections[-2::-1], selections[:0:-1], strict=True):
        cosines = selection.cosines
        if not selection.known.all():
            cosines = carry_back(cosines, filled[-1], selection.known, later.anew)
        filled.append(cosines)
    weights = normalise_weights([selection.learning_rate for selection in selections])
    return influence(filled[::-1], weights, config.reduce, selections[-1].labels, situation.memory)


def _candidates(situation: Situation, past: list[_Selection]) -> Candidates | None:
    """The rows that this selection scores; None for all."""
    config, count = situation.config, len(situation.train.examples)
    if config.candidates is None or not (past or config.prefilter):
        return None
    if past:
        last, _ = _accumulated(past, situation)
    else:
        last = make_selector(needed(config.prefilter)).score(situation).score
    generator = np.random.default_rng((config.seed, 4, situation.step))
    chosen = choose_candidates(processes.broadcast(last), config.candidates, generator)
    situation.progress.say(f"{len(chosen.indices)} of {count} rows are scored anew")
    return chosen


def _remember(situation: Situation, selection: _Selection) -> None:
    """Write what this selection found; atomic."""
    if processes.rank() == 0:
        tensors = {"cosines": np.ascontiguousarray(selection.cosines), "known": selection.known, "anew": selection.anew}
        about = {"learning_rate": repr(selection.learning_rate), "labels": json.dumps(selection.labels)}
        with atomic(situation.memory / f"step-{situation.step}.safetensors", "wb") as handle:
            handle.write(save(tensors, metadata=about))
    processes.barrier()


def _recall(memory: Path, step: int) -> _Selection:
    with safe_open(memory / f"step-{step}.safetensors", framework="np") as file:
        about = file.metadata()
        return _Selection(
            json.loads(about["labels"]),
            file.get_tensor("cosines"),
            file.get_tensor("known"),
            file.get_tensor("anew"),
            float(about["learning_rate"]),
        )


def _exact(situation: Situation, chosen: Candidates | None) -> tuple[list[str], np.ndarray]:
    config, capture = situation.config, situation.capture
    train = situation.train.examples
    if chosen is not None:
        train = [train[index] for index in chosen.indices.tolist()]
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
        reference=reference_weights(config, len(train), chosen.weights if chosen else None),
        scratch=situation.memory,
    )


def _stored(situation: Situation, chosen: Candidates | None) -> tuple[list[str], np.ndarray]:
    config = situation.config
    train_split = situation.train if chosen is None else part_of(situation.train, chosen.indices.tolist())
    paths = []
    for name, split in (("eval", situation.validation), ("train", train_split)):
        path = situation.cache / f"{name}.h5"
        collect(
            config,
            situation.capture,
            split,
            name,
            situation.moments,
            path,
            situation.progress,
            cache=True,
            standing_for=chosen.weights if chosen and name == "train" else None,
        )
        paths.append(path)
    found: tuple[list[str], np.ndarray] | None = None
    if processes.rank() == 0:
        [(train, validation)] = open_pairs([paths[1]], [paths[0]])
        with train, validation:
            stored = stored_cosines(
                train,
                validation,
                situation.progress,
                per_row=config.per_row,
                contrast=config.contrast != 0,
                scratch=situation.cache,
            )
        found = stored.labels, stored.values
        # the first selection, of all rows, speaks for the run; other selectors' parts of a score are not projected
        if not situation.past_steps and chosen is None and parts_of(config.selector) == ["less"]:
            halves = halves_of_scores(stored, config.reduce)
            warn_of_projection(projection_correlation([halves], [1.0]), train.manifest)
    return needed(processes.broadcast(found))
