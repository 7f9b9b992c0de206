"""Scores from vectors of the rows' text or hidden states: their cosines with the vectors of the validation rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from dataflex import processes
from dataflex.data.examples import Example
from dataflex.data.rows import subtasks_of
from dataflex.files import atomic, scratch_array
from dataflex.influence.scores import ONE_SUBTASK, Scores, influence, settle
from dataflex.selectors.protocol import Situation

STRIPE_ROWS = 4096


def labels_of(validation: Sequence[Example]) -> list[str]:
    """The subtask of each validation row."""
    return [name or ONE_SUBTASK for name in subtasks_of(validation)]


def scores_of_similarities(situation: Situation, similarities: np.ndarray) -> Scores:
    """Scores from the similarity [V, N] of each training row with each validation row, by `reduce` and `normalise`."""
    config = situation.config
    labels, values = settle(labels_of(situation.validation.examples), similarities, config.normalise, config.reduce)
    score, by_subtask = influence([values], [1.0], config.reduce, labels)
    return situation.scores(score, by_subtask)


def cosines(validation: np.ndarray, train: np.ndarray, situation: Situation) -> np.ndarray:
    """The cosine [V, N] float32 of each of `train` [N, d] with each of `validation` [V, d]; 0 for a vector of zeros."""
    found = scratch_array((len(validation), len(train)), np.float32, situation.memory)
    queries = unit(validation)
    for start in range(0, len(train), STRIPE_ROWS):
        found[:, start : start + STRIPE_ROWS] = queries @ unit(train[start : start + STRIPE_ROWS]).T
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d] of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def once(situation: Situation, name: str, made_from: Sequence[object], make: Callable[[], Scores]) -> Scores:
    """The scores that `make` gives, made once a run. Collective.

    They are kept in the run's folder under a digest of both splits' rows and of `made_from`, for later selections.
    """
    rows = [situation.train.fingerprint, situation.validation.fingerprint]
    settings = [situation.config.reduce, situation.config.normalise]
    digest = hashlib.sha256(json.dumps([rows, settings, list(made_from)]).encode()).hexdigest()
    path = situation.memory / f"{name}-{digest[:16]}.safetensors"
    if not processes.broadcast(path.is_file()):
        scores = make()
        if processes.rank() == 0:
            parts = {f"subtask {key}": value for key, value in scores.subtasks.items()}
            with atomic(path, "wb") as handle:
                handle.write(save({"score": scores.score, **parts}))
        processes.barrier()
    with safe_open(path, framework="np") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors handle is not a mapping)
    score = held.pop("score")
    return situation.scores(score, {key.removeprefix("subtask "): value for key, value in held.items()})
