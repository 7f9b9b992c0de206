"""`component_name: rds`: rows whose hidden states are near the validation rows' (RDS+, arXiv 2503.01807)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataflex.data.examples import Example
from dataflex.files import scratch_array
from dataflex.fingerprints import base_model_fingerprint
from dataflex.gradients.loss import hidden_states
from dataflex.gradients.passes import forward_rows, gathered_rows
from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Situation
from dataflex.selectors.similarity import cosines, once, scores_of_similarities


class RdsSelector:
    """The frozen base model reads each row; the adapter takes no part, so a run does this once."""

    def score(self, situation: Situation) -> Scores:
        base_model, _ = base_model_fingerprint(situation.config, situation.progress)

        def make() -> Scores:
            train = row_vectors(situation, situation.train.examples, "train hidden states")
            validation = row_vectors(situation, situation.validation.examples, "eval hidden states")
            mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
            train -= mean
            return scores_of_similarities(situation, cosines(validation - mean, train, situation))

        return once(situation, "rds", [base_model, str(situation.capture.dtype)], make)


def row_vectors(situation: Situation, examples: Sequence[Example], description: str) -> np.ndarray:
    """[N, H] float32: each row's hidden states of the last layer, the mean over its tokens weighted by their position
    (1, 2, … from the first). Collective."""
    capture = situation.capture
    model: Any = capture.model

    def compute(rows: list[Example], input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with model.disable_adapter():
            hidden = hidden_states(model, input_ids).float()
        position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        lengths = torch.tensor([[len(row.input_ids)] for row in rows], device=hidden.device)
        weights = torch.where(position <= lengths, position, 0).float()
        return torch.einsum("rt,rth->rh", weights / weights.sum(dim=1, keepdim=True), hidden)

    weight = model.get_output_embeddings().weight
    width = getattr(weight, "ds_shape", weight.shape)[-1]  # ZeRO-3 leaves an empty tensor in its place
    out = scratch_array((len(examples), width), np.float32, situation.memory)
    return gathered_rows(forward_rows(capture, examples, compute, situation.progress, description), out)
