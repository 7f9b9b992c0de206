"""From rows to the figures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def figures_of(loss: np.ndarray, tokens: np.ndarray, matches: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The figures of rows with mean cross-entropies `loss` [N] and `tokens` [N] supervised tokens.

    `loss` is the mean over rows of each row's mean cross-entropy in nats; `token_loss` is the mean over all supervised
    tokens; `perplexity` is exp(token_loss). Of each of `matches` [N] by name, 1 or 0 and NaN for a row without a part
    in it, the share of rows that match; NaN where no row has a part.
    """
    token_loss = float((loss * tokens).sum() / tokens.sum())
    return {
        "rows": len(loss),
        "tokens": int(tokens.sum()),
        "loss": float(loss.mean()),
        "token_loss": token_loss,
        "perplexity": math.exp(token_loss) if token_loss < 700 else math.inf,
        **{name: _share(values) for name, values in matches.items()},
    }


def _share(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def by_name(
    names: Sequence[str | None], loss: np.ndarray, tokens: np.ndarray, matches: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """The figures of the rows of each name [N], in the order of the names' first rows; rows without a name are left
    out."""
    column = np.array(names, dtype=object)
    found = dict.fromkeys(name for name in names if name is not None)
    parts = {name: column == name for name in found}
    return {
        name: figures_of(loss[part], tokens[part], {kind: values[part] for kind, values in matches.items()})
        for name, part in parts.items()
    }
