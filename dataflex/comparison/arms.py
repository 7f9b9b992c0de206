"""Which rows each arm of a comparison trains on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

UNTOUCHED = "untouched"
"""The arm that is not trained at all."""
ALL = "all"
"""The arm that trains on every row."""
RANDOM = "random"
"""The arm that every other one is compared with."""
CONTROLS = (RANDOM, "length")
"""Selectors that every comparison has beside those it is asked for."""

TENTHS = 10


@dataclass(frozen=True)
class Training:
    """One training of a comparison: the rows of an arm, from the start that its seed gives."""

    arm: str
    seed: int
    part: str
    """What distinguishes the trainings of an arm and a seed: the budget as a share, the tenth, or the random half."""
    indices: np.ndarray
    """The rows by position in the pool, best first."""
    budget: float | None = None
    """The share of the pool that was to be taken; None for a tenth or a random half."""

    @property
    def name(self) -> str:
        """A name for files."""
        return file_name(f"{self.arm}-{self.part}")


def file_name(name: str) -> str:
    """`name` with a dash for whatever does not belong into a file's name."""
    return re.sub(r"[^\w.+-]", "-", name)


def rows_of_budget(order: np.ndarray, tokens: np.ndarray, share: float, by: Literal["rows", "tokens"]) -> np.ndarray:
    """The first indices of `order`, as many as `share` of the pool allows; at least one.

    Args:
        order: [N] indices, best first.
        tokens: [M] supervised tokens of each row of the pool.
        by: `rows` takes that share of the pool's rows, rounded down. `tokens` takes rows until their supervised tokens
            come nearest to that share of the pool's.
    """
    if by == "rows":
        return order[: max(1, int(round(share * len(tokens), 9)))]
    sums = np.cumsum(tokens[order])
    return order[: int(np.argmin(np.abs(sums - share * tokens.sum()))) + 1]


def tenths(order: np.ndarray) -> list[np.ndarray]:
    """A ranking, best first, cut into ten parts of equal size, give or take a row."""
    return np.array_split(order, TENTHS)


def random_halves(count: int, number: int, seed: int) -> list[np.ndarray]:
    """`number` random halves of `count` rows, each drawn without replacement."""
    generator = np.random.default_rng((seed, 3))
    return [generator.permutation(count)[: max(1, count // 2)] for _ in range(number)]


def all_is_affordable(budgets: list[float], arms: int) -> bool:
    """Whether training on every row costs no more than all the other arms of a seed together."""
    return arms * sum(budgets) >= 1
