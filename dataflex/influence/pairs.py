"""Stores opened in pairs, a training and a validation store a checkpoint, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataflex.config import RunConfig, needed
from dataflex.errors import UsageError
from dataflex.influence.scores import parse_weights
from dataflex.store.reader import GradientStore, open_store


def open_weighted(config: RunConfig) -> tuple[list[tuple[GradientStore, GradientStore]], list[float]]:
    """The stores that `score` compares, a training and a validation store a checkpoint, and each checkpoint's weight.

    Raises:
        UsageError: as `open_pairs` and `parse_weights`; for a store without the reference rows that `contrast` names.
    """
    pairs = open_pairs(needed(config.train_stores), needed(config.eval_stores))
    weights = parse_weights(config.weights, [train.manifest.learning_rate or 0.0 for train, _ in pairs])
    for train, _ in pairs:
        _check_contrast(train, config)
    return pairs, weights


def _check_contrast(train: GradientStore, config: RunConfig) -> None:
    """Raise a UsageError where a store sums other reference rows than `contrast` names."""
    if config.contrast:
        _ = train.reference  # raises where there is none
    collected = train.manifest.settings.get("contrast", 0)
    if config.contrast and collected and collected != config.contrast:
        raise UsageError(
            f"{train.path} was collected with contrast {collected}, not {config.contrast}; score with "
            f"contrast={collected}, or collect the training rows again"
        )


def open_pairs(
    train: Sequence[str | Path], validation: Sequence[str | Path]
) -> list[tuple[GradientStore, GradientStore]]:
    """The stores of each checkpoint, checked to be whole and comparable.

    Raises:
        UsageError: naming the stores and what is wrong: training and validation stores are swapped or mixed, the
            projection or the parameters differ within a pair, the rows or the direction between checkpoints.
    """
    if len(train) != len(validation):
        raise UsageError(
            f"{len(train)} training stores and {len(validation)} validation stores; "
            "give one of each per checkpoint, in order"
        )
    pairs = [(open_store(first), open_store(second)) for first, second in zip(train, validation, strict=True)]
    for ours, theirs in pairs:
        ours.require_sound()
        theirs.require_sound()
        _check_role(ours, "train", "--train")
        _check_role(theirs, "eval", "--eval")
        differing = ours.manifest.space_differences(theirs.manifest)
        if differing:
            raise UsageError(f"{ours.path} and {theirs.path} cannot be compared, they differ in {', '.join(differing)}")
        ours.require_whole()
        theirs.require_whole()
    first, first_validation = pairs[0]
    for ours, theirs in pairs[1:]:
        for one, other in ((first, ours), (first_validation, theirs)):
            _check_same_rows(one, other)
    return pairs


def _check_role(store: GradientStore, split: str, option: str) -> None:
    """Raise a UsageError unless a store holds the split that `option` asks for; one that another program made may
    not say."""
    found = store.manifest.split
    if found not in (None, split):
        raise UsageError(
            f"{option} {store.path} holds the gradients of {found} rows, not of {split} rows; did you swap them? "
            f"`dataflex grads --split {split}` writes the store that {option} takes"
        )


def _check_same_rows(one: GradientStore, other: GradientStore) -> None:
    """Raise a UsageError unless two stores hold the same rows and the same kind of direction."""
    if one.manifest.data != other.manifest.data or not np.array_equal(one.row, other.row):
        raise UsageError(f"{one.path} and {other.path} hold different rows; collect both from the same data")
    for name in ("gradient_type", "adam_formula"):
        before, after = one.manifest[name], other.manifest[name]
        if before != after:
            raise UsageError(
                f"{one.path} and {other.path} hold different directions, {name} {before} and {after}; "
                "scores of several checkpoints need the same one at each"
            )
