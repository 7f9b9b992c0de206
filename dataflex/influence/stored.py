"""Scores from gradient stores: one pass over each training store, whatever the number of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataflex.errors import UsageError
from dataflex.gradients.manifest import PROJECTION_KEYS, differences
from dataflex.gradients.store import GradientStore, open_store
from dataflex.influence.scores import subtask_means
from dataflex.progress import SILENT, Progress

BLOCK_BYTES = 64 << 20


def stored_cosines(
    train: GradientStore, validation: GradientStore, progress: Progress = SILENT
) -> tuple[list[str], np.ndarray]:
    """Each training row's mean cosine with each subtask's rows: names, and [S, N] float32.

    Resident memory is a block of training rows plus the validation store.
    """
    names, queries = subtask_means(validation[:], validation.subtask)
    block = max(1, BLOCK_BYTES // (4 * train.dim))
    cosines = np.empty((len(names), len(train)), dtype=np.float32)
    with progress.task("scoring", len(train), "rows") as task:
        for start, rows in train.blocks(block):
            cosines[:, start : start + len(rows)] = queries @ rows.T
            task.advance(len(rows))
    return names, cosines


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
        ours.require_whole()
        theirs.require_whole()
        differing = differences(ours.manifest, theirs.manifest, PROJECTION_KEYS)
        if differing:
            raise UsageError(f"{ours.path} and {theirs.path} cannot be compared, they differ in {', '.join(differing)}")
    first, first_validation = pairs[0]
    for ours, theirs in pairs[1:]:
        for one, other in ((first, ours), (first_validation, theirs)):
            if one.manifest["data"] != other.manifest["data"] or not np.array_equal(one.row, other.row):
                raise UsageError(f"{one.path} and {other.path} hold different rows; collect both from the same data")
    return pairs
