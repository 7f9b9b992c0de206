"""A selector's scores without a run: the `score` command."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.config import RunConfig
from dataflex.data.examples import Split
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.collect import checkpoint_capture
from dataflex.influence.scores import Scores, parse_weights, weighted_sum
from dataflex.model import add_lora, compute_dtype, load_frozen_model, on_device
from dataflex.progress import Progress
from dataflex.selectors.protocol import Situation
from dataflex.selectors.scoring import score_rows
from dataflex.selectors.table import make_selector, reads_of
from dataflex.training.moments import load_moments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def scores_of_selector(
    name: str,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Split,
    validation: Split | None,
    memory: Path,
    progress: Progress,
) -> Scores:
    """The scores of the selector `name`: at each checkpoint, weighted, where it looks at the adapter, else once."""
    config = config.changed(selector=name)
    checkpoints: list[Path | None] = [Path(checkpoint) for checkpoint in config.checkpoint or []]
    if not checkpoints or reads_of(name) != {"adapter"}:
        checkpoints = checkpoints[:1] or [None]
    moments = [load_moments(checkpoint) if checkpoint else None for checkpoint in checkpoints]
    rates = [held.learning_rate if held else config.learning_rate for held in moments]
    weights = parse_weights(config.weights, rates)
    selector = make_selector(name)
    scores: list[Scores] = []
    for checkpoint, held in zip(checkpoints, moments, strict=True):
        situation = Situation(
            config=config,
            tokenizer=tokenizer,
            train=train,
            compared_with=validation,
            open_capture=functools.partial(_capture_at, config, checkpoint, tokenizer.pad_token_id),
            moments=held,
            step=held.step if held else 0,
            cache=memory,
            memory=memory,
            past_steps=[],
            progress=progress,
        )
        scores.append(score_rows(selector, situation))
    total = weighted_sum(weights, [one.score for one in scores])
    return replace(scores[0], score=total) if len(scores) > 1 else scores[0]


def _capture_at(config: RunConfig, checkpoint: Path | None, pad_token_id: int) -> Capture:
    """The model at a checkpoint, or as it is before any training."""
    if checkpoint is not None:
        return checkpoint_capture(config, checkpoint, pad_token_id)
    model = on_device(add_lora(load_frozen_model(config), config))
    return make_capture(model, compute_dtype(config), pad_token_id, config.token_budget)
