"""Scores from gradient stores: one pass over each training store, whatever the number of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataflex.errors import UsageError
from dataflex.gradients.manifest import PROJECTION_KEYS, differences
from dataflex.gradients.store import GradientStore, open_store
from dataflex.influence.scores import ONE_SUBTASK, check_subtasks, subtask_means
from dataflex.progress import SILENT, Progress

BLOCK_BYTES = 64 << 20


def stored_cosines(
    train: GradientStore, validation: GradientStore, progress: Progress = SILENT
) -> tuple[list[str], np.ndarray]:
    """Each training row's mean cosine with each subtask's rows: names, and [S, N] float32.

    Bad rows that were skipped have NaN, or have no part in the means. Resident memory is a block of training
    rows plus the validation store.
    """
    names, queries = _means_of(validation)
    block = max(1, BLOCK_BYTES // (4 * train.dim))
    cosines = np.empty((len(names), len(train)), dtype=np.float32)
    with progress.task("scoring", len(train), "rows") as task:
        for start, rows in train.blocks(block):
            cosines[:, start : start + len(rows)] = queries @ rows.T
            task.advance(len(rows))
    if not np.isfinite(cosines).all():
        raise UsageError(f"gradient store {train.path}: damaged, it holds numbers that are not finite")
    cosines[:, train.bad] = np.nan
    return names, cosines


def _means_of(validation: GradientStore) -> tuple[list[str], np.ndarray]:
    """The mean unit vector of each subtask's rows, the bad ones left out."""
    good = np.flatnonzero(~validation.bad)
    subtask = validation.subtask
    kept = None if subtask is None else [subtask[index] for index in good]
    check_subtasks(sorted(set(subtask or [ONE_SUBTASK]) - set(kept or [ONE_SUBTASK] * min(1, len(good)))))
    return subtask_means(validation[:][good], kept)


def open_pairs(
    train: Sequence[str | Path], validation: Sequence[str | Path]
) -> list[tuple[GradientStore, GradientStore]]:
    """The stores of each checkpoint, checked to be whole and comparable.

    Raises:
        UsageError: naming the stores and what differs: the projection or the parameters within a pair,
            the rows between checkpoints.
    """
    if len(train) != len(validation):
        raise UsageError(
            f"{len(train)} training stores and {len(validation)} validation stores; "
            "give one of each per checkpoint, in order"
        )
    pairs = [(open_store(first), open_store(second)) for first, second in zip(train, validation, strict=True)]
    for ours, theirs in pairs:
        differing = differences(ours.manifest, theirs.manifest, PROJECTION_KEYS)
        if differing:
            raise UsageError(f"{ours.path} and {theirs.path} cannot be compared, they differ in {', '.join(differing)}")
        ours.require_whole()
        theirs.require_whole()
    first, first_validation = pairs[0]
    for ours, theirs in pairs[1:]:
        for one, other in ((first, ours), (first_validation, theirs)):
            if one.manifest["data"] != other.manifest["data"] or not np.array_equal(one.row, other.row):
                raise UsageError(f"{one.path} and {other.path} hold different rows; collect both from the same data")
    return pairs
