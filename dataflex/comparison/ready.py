"""A comparison that is ready to begin, and the pool that its arms pick from."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataflex.comparison.arms import ALL, UNTOUCHED
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split
from dataflex.data.rows import count_by_dataset, row_numbers, supervised_tokens
from dataflex.origin import Origin
from dataflex.progress import Progress


def arms_of(selectors: Iterable[str], with_all: bool) -> list[str]:
    """The names of all arms."""
    return [UNTOUCHED, *selectors, *([ALL] if with_all else [])]


@dataclass(frozen=True)
class Comparison:
    """What `prepare_compare` found."""

    config: RunConfig
    came_from: Origin | None
    """None in a dry run."""
    pool: Split
    selectors: Mapping[str, RunConfig]
    """By name, in order, the configuration with the selector and the parameters of that component."""
    with_all: bool
    """Whether an arm trains on every row."""
    progress: Progress

    @property
    def folder(self) -> Path:
        return Path(needed(self.config.output_dir))

    @property
    def seeds(self) -> list[int]:
        return [self.config.seed + number for number in range(self.config.seeds)]

    @property
    def arms(self) -> list[str]:
        return arms_of(self.selectors, self.with_all)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[N] the row numbers of the pool."""
        return row_numbers(self.pool.examples)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """[N] the supervised tokens of each row of the pool."""
        return supervised_tokens(self.pool.examples)

    def by_dataset(self, indices: np.ndarray | None = None) -> dict[str, int]:
        """How many of the rows at `indices`, or of all rows, come from each dataset."""
        return count_by_dataset(self.pool.examples, range(len(self.rows)) if indices is None else indices.tolist())
