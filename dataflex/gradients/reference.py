"""Which training rows `contrast` takes as its reference."""

from __future__ import annotations

import numpy as np

from dataflex.config import RunConfig


def reference_weights(config: RunConfig, count: int, standing_for: np.ndarray | None = None) -> dict[int, float]:
    """The weight in the reference's mean of each reference row, by its index among `count` training rows.

    None, `contrast` random rows, or all. Random ones are drawn from `proj_seed` in a stream of their own.

    Args:
        standing_for: [count] how many rows of the pool each row stands for, where the rows are a sample of it.
    """
    if config.contrast == 0:
        return {}
    if config.contrast == "pool":
        indices = np.arange(count)
    else:
        indices = np.sort(np.random.default_rng((config.proj_seed, 3)).permutation(count)[: config.contrast])
    weights = np.ones(count) if standing_for is None else standing_for
    return dict(zip(indices.tolist(), weights[indices].tolist(), strict=True))
