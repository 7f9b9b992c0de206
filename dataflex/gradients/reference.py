"""Which training rows `contrast` takes as its reference."""

from __future__ import annotations

import numpy as np

from dataflex.config import RunConfig


def reference_rows(config: RunConfig, count: int) -> list[int]:
    """Indices, ascending, of the reference rows among `count` training rows: none, `contrast` random ones, or all.

    They are drawn from `proj_seed` in a stream of their own.
    """
    if config.contrast == "pool":
        return list(range(count))
    drawn = np.random.default_rng((config.proj_seed, 3)).permutation(count)[: config.contrast]
    return sorted(drawn.tolist())
