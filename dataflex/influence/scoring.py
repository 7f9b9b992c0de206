"""The `score` command: from gradient stores, or exactly from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split, dated
from dataflex.data.rows import supervised_tokens
from dataflex.gradients.capture import Capture
from dataflex.gradients.collect import checkpoint_capture, manifest_of
from dataflex.gradients.direction import make_direction
from dataflex.gradients.probe import TRYING, check_capture
from dataflex.gradients.reference import reference_weights
from dataflex.influence.exact import exact_cosines
from dataflex.influence.pairs import open_weighted
from dataflex.influence.projection_error import halves_of_scores, projection_correlation, warn_of_projection
from dataflex.influence.score_file import write_scores
from dataflex.influence.scores import (
    Scores,
    influence,
    length_correlation,
    parse_weights,
    scores_of,
    settle,
)
from dataflex.influence.sidecar import write_with_manifest
from dataflex.influence.stored import stored_cosines
from dataflex.model import load_tokenizer
from dataflex.needs import check_needs, scoring_way
from dataflex.outline import outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Progress
from dataflex.selectors.combined import combine
from dataflex.selectors.standalone import scores_of_selector
from dataflex.selectors.table import compares, make_selector, parts_of
from dataflex.store.reader import GradientStore
from dataflex.training.moments import AdamMoments, load_moments


def score(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Score the training rows and write the score file `output`; return its path.

    From `train_stores` and `eval_stores`, paired in order, or where these are not given by the selector
    `component_name`, which takes what it needs at each of `checkpoint`. `exact` is the selector `less` with plain keys.
    """
    ready = prepare_score(config, Plan("score"), progress)
    path = Path(needed(config.output))
    if isinstance(ready, StoredScoring):
        found = _stored_scores(config, ready, progress)
    elif isinstance(ready, ExactScoring):
        found = _exact_scores(ready, progress)
    else:
        found = _selected_scores(ready, progress)
    scores = found.scores
    skipped = int(np.isnan(scores.score).sum())
    if skipped:
        progress.say(f"{skipped} of {len(scores.row)} rows have no gradient that can be scored; they are left out")
    if processes.rank() == 0:
        settings = {key: getattr(config, key) for key in ("reduce", "normalise", "contrast")}
        correlation = length_correlation(scores.score, found.tokens)
        came_from = {"command": "score", "length_correlation": correlation, **settings, **found.came_from}
        write_with_manifest(path, lambda: write_scores(scores, path), len(scores.row) - skipped, came_from)
    processes.barrier()
    return path


@dataclass(frozen=True)
class Found:
    """Scores, and what is told of them."""

    scores: Scores
    tokens: np.ndarray
    """[N] supervised tokens of each row."""
    came_from: dict[str, Any]


@dataclass(frozen=True)
class StoredScoring:
    """Stores that can be scored."""

    pairs: list[tuple[GradientStore, GradientStore]]
    """The training and the validation store of each checkpoint."""
    weights: list[float]


@dataclass(frozen=True)
class ExactScoring:
    """Rows and checkpoints that can be scored."""

    config: RunConfig
    first: Capture
    """At the first checkpoint."""
    train: Split
    validation: Split
    moments: list[AdamMoments | None]
    """Of each checkpoint."""
    weights: list[float]


@dataclass(frozen=True)
class SelectedScoring:
    """Rows that a selector can score."""

    config: RunConfig
    tokenizer: Any
    train: Split
    validation: Split | None
    exact: ExactScoring | None
    """For `less`."""


def prepare_score(
    config: RunConfig, plan: Plan, progress: Progress = SILENT
) -> StoredScoring | ExactScoring | SelectedScoring:
    """Find out and check everything that `score` needs; nothing is written."""
    check_needs(config, "score")
    how = scoring_way(config)
    if how == "stores":
        return StoredScoring(*open_weighted(config))
    if how == "exact":
        return _prepare_exact(config, plan, progress)
    if not plan.dry_run:
        processes.join(config.ddp_timeout)
    make_selector(config.selector)
    if "less" in parts_of(config.selector):
        exact = _prepare_exact(config, plan, progress)
        tokenizer = load_tokenizer(exact.config, local_only=plan.dry_run)
        return SelectedScoring(exact.config, tokenizer, exact.train, exact.validation, exact)
    config = dated(config)
    names: list[Literal["train", "eval"]] = ["train", "eval"] if compares(config.selector) else ["train"]
    tokenizer, splits = read_rows(config, names, plan, progress)
    return SelectedScoring(config, tokenizer, splits["train"], splits.get("eval"), None)


def _prepare_exact(config: RunConfig, plan: Plan, progress: Progress) -> ExactScoring:
    if not plan.dry_run:
        processes.join(config.ddp_timeout)
    checkpoints = [Path(checkpoint) for checkpoint in needed(config.checkpoint)]
    moments = [load_moments(checkpoint) for checkpoint in checkpoints]
    rates = [held.learning_rate if held else config.learning_rate for held in moments]
    weights = parse_weights(config.weights, rates)
    config = dated(config)
    tokenizer, splits = read_rows(config, ["train", "eval"], plan, progress)
    sizes = [outline(config, plan, splits.values(), checkpoint, config.grad_layers) for checkpoint in checkpoints]
    for held, of_checkpoint in zip(moments, sizes, strict=True):
        for gradient_type in (config.gradient_type, config.eval_gradient_type):
            make_direction(gradient_type, config.adam_formula, held, of_checkpoint.slots)
    plan.needs_weights(config, sizes[0].base)
    first = checkpoint_capture(config, checkpoints[0], tokenizer.pad_token_id)
    progress.say(TRYING)
    check_capture(first, splits["train"].examples, progress)
    return ExactScoring(config, first, splits["train"], splits["eval"], moments, weights)


def _stored_scores(config: RunConfig, ready: StoredScoring, progress: Progress) -> Found:
    pairs, weights = ready.pairs, ready.weights
    scratch = Path(needed(config.output)).parent
    cosines: list[np.ndarray] = []
    labels: list[str] = []
    train = pairs[0][0]
    halves: list[np.ndarray | None] = []
    for ours, theirs in pairs:
        found = stored_cosines(
            ours, theirs, progress, per_row=config.per_row, contrast=config.contrast != 0, scratch=scratch
        )
        halves.append(halves_of_scores(found, config.reduce))
        labels, values = found.labels, found.values
        if config.per_row:
            labels, values = settle(labels, values, config.normalise, config.reduce)
        cosines.append(values)
    total, by_subtask = influence(cosines, weights, config.reduce, labels, scratch)
    correlation = projection_correlation(halves, weights)
    warn_of_projection(correlation, train.manifest)
    came_from = {
        **({} if correlation is None else {"projection_correlation": correlation}),
        "files": train.manifest.files,
        "weights": weights,
        "checkpoints": [
            {"train": ours.manifest.summary(), "eval": theirs.manifest.summary()} for ours, theirs in pairs
        ],
    }
    return Found(Scores(train.row, total, by_subtask, train.dataset), train.tokens, came_from)


def _exact_scores(ready: ExactScoring, progress: Progress) -> Found:
    config, splits, weights = ready.config, (ready.train, ready.validation), ready.weights
    train, validation = (split.examples for split in splits)
    made: list[dict[str, Any]] = []
    labels: list[str] = []
    cosines: list[np.ndarray] = []
    path = Path(needed(config.output))
    for index, (checkpoint, held) in enumerate(zip(needed(config.checkpoint), ready.moments, strict=True)):
        capture = ready.first
        if index > 0:
            capture = checkpoint_capture(config, Path(checkpoint), ready.first.pad_token_id)
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
            reference=reference_weights(config, len(train)),
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
    total, by_subtask = influence(cosines, weights, config.reduce, labels, path.parent)
    came_from = {"files": splits[0].files, "weights": weights, "checkpoints": made}
    scores = scores_of(train, len(needed(config.dataset)) > 1, total, by_subtask)
    return Found(scores, supervised_tokens(train), came_from)


def _selected_scores(ready: SelectedScoring, progress: Progress) -> Found:
    config = ready.config
    came_from: dict[str, Any] = {
        "selector": config.selector,
        "files": ready.train.files,
        "data": {"train": ready.train.fingerprint, "eval": ready.validation.fingerprint if ready.validation else None},
    }
    folder = Path(needed(config.output)).parent
    with processes.shared_folder(folder) as memory:
        parts: list[Scores] = []
        for name in parts_of(config.selector):
            if name == "less":
                found = _exact_scores(needed(ready.exact), progress)
                parts.append(found.scores)
                came_from |= found.came_from
            else:
                parts.append(
                    scores_of_selector(name, config, ready.tokenizer, ready.train, ready.validation, memory, progress)
                )
    tokens = supervised_tokens(ready.train.examples)
    if len(parts) == 1:
        return Found(parts[0], tokens, came_from)
    return Found(replace(parts[0], score=combine([part.score for part in parts]), subtasks={}), tokens, came_from)
