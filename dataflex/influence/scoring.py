"""The `score` command: from gradient stores, or exactly from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import RunConfig, needed, require
from dataflex.data.examples import dated, load_split
from dataflex.errors import UsageError
from dataflex.files import check_output_file
from dataflex.gradients.collect import checkpoint_capture, manifest_of
from dataflex.gradients.direction import make_direction
from dataflex.gradients.reference import reference_rows
from dataflex.influence.exact import exact_cosines
from dataflex.influence.scores import Scores, influence, parse_weights, scores_of, settle, write_scores
from dataflex.influence.sidecar import write_with_manifest
from dataflex.influence.stored import open_pairs, stored_cosines
from dataflex.model import check_vocabulary, load_tokenizer
from dataflex.progress import SILENT, Progress
from dataflex.store.reader import GradientStore
from dataflex.training.moments import load_moments


def score(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Score the training rows and write the score file `output`; return its path.

    With `exact` the gradients are taken here, at each of `checkpoint`; else they come from
    `train_stores` and `eval_stores`, paired in order.
    """
    require(config, "score")
    path = check_output_file(needed(config.output), config.overwrite)
    if config.exact and (config.train_stores or config.eval_stores):
        raise UsageError("exact scores need no stores; give either --exact with --checkpoint, or --train and --eval")
    scores, came_from = _exact_scores(config, progress) if config.exact else _stored_scores(config, progress)
    skipped = int(np.isnan(scores.score).sum())
    if skipped:
        progress.say(f"{skipped} of {len(scores.row)} rows have no gradient that can be scored; they are left out")
    if processes.rank() == 0:
        listed = len(scores.row) - skipped
        settings = {key: getattr(config, key) for key in ("reduce", "normalise", "contrast")}
        came_from = {"command": "score", **settings, **came_from}
        write_with_manifest(path, lambda: write_scores(scores, path), listed, came_from)
    processes.barrier()
    return path


def _stored_scores(config: RunConfig, progress: Progress) -> tuple[Scores, dict[str, Any]]:
    require(config, "score", "train_stores", "eval_stores")
    pairs = open_pairs(needed(config.train_stores), needed(config.eval_stores))
    weights = parse_weights(config.weights, [train.manifest.learning_rate or 0.0 for train, _ in pairs])
    scratch = Path(needed(config.output)).parent
    cosines: list[np.ndarray] = []
    labels: list[str] = []
    for ours, theirs in pairs:
        _check_contrast(ours, config)
        labels, values = stored_cosines(
            ours, theirs, progress, per_row=config.per_row, contrast=config.contrast != 0, scratch=scratch
        )
        if config.per_row:
            labels, values = settle(labels, values, config.normalise, config.reduce)
        cosines.append(values)
    total, by_subtask = influence(cosines, weights, config.reduce, labels)
    train = pairs[0][0]
    came_from = {
        "files": train.manifest.files,
        "weights": weights,
        "checkpoints": [
            {"train": ours.manifest.summary(), "eval": theirs.manifest.summary()} for ours, theirs in pairs
        ],
    }
    return Scores(train.row, total, by_subtask, train.dataset), came_from


def _check_contrast(train: GradientStore, config: RunConfig) -> None:
    """Raise a UsageError where a store sums other reference rows than `contrast` names."""
    collected = train.manifest.settings.get("contrast", 0)
    if config.contrast and collected and collected != config.contrast:
        raise UsageError(
            f"{train.path} was collected with contrast {collected}, not {config.contrast}; score with "
            f"contrast={collected}, or collect the training rows again"
        )


def _exact_scores(config: RunConfig, progress: Progress) -> tuple[Scores, dict[str, Any]]:
    require(config, "score --exact", "model_name_or_path", "dataset", "eval_dataset", "checkpoint")
    processes.join(config.ddp_timeout)
    checkpoints = [Path(checkpoint) for checkpoint in needed(config.checkpoint)]
    moments = [load_moments(checkpoint) for checkpoint in checkpoints]
    rates = [held.learning_rate if held else config.learning_rate for held in moments]
    weights = parse_weights(config.weights, rates)
    config = dated(config)
    tokenizer = load_tokenizer(config)
    splits = [load_split(config, tokenizer, split, progress) for split in ("train", "eval")]
    train, validation = (split.examples for split in splits)
    made: list[dict[str, Any]] = []
    labels: list[str] = []
    cosines: list[np.ndarray] = []
    path = Path(needed(config.output))
    for checkpoint, held in zip(checkpoints, moments, strict=True):
        capture = checkpoint_capture(config, checkpoint, tokenizer.pad_token_id)
        check_vocabulary(capture.model, [*train, *validation], config.template)
        train_direction, validation_direction = (
            make_direction(kind, config.adam_formula, held, capture.slots, config.marginal)
            for kind in (config.gradient_type, config.eval_gradient_type)
        )
        labels, values = exact_cosines(
            capture,
            train,
            validation,
            train_direction,
            validation_direction,
            progress,
            config.skip_bad_rows,
            per_row=config.per_row,
            reference=[train[index] for index in reference_rows(config, len(train))],
            scratch=path.parent,
        )
        if config.per_row:
            labels, values = settle(labels, values, config.normalise, config.reduce)
        cosines.append(values)
        made.append(
            {
                name: manifest_of(config, capture, split, name, held, progress).summary()
                for name, split in zip(("train", "eval"), splits, strict=True)
            }
        )
    total, by_subtask = influence(cosines, weights, config.reduce, labels)
    came_from = {"files": splits[0].files, "weights": weights, "checkpoints": made}
    return scores_of(train, len(needed(config.dataset)) > 1, total, by_subtask), came_from
