"""Which rows each arm of a comparison trains on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

HALF = "half"
"""The arm of the random halves that the linear datamodeling score takes."""

TENTHS = 10
By = Literal["rows", "tokens"]


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
    def key(self) -> tuple[str, int, str]:
        return self.arm, self.seed, self.part

    @property
    def name(self) -> str:
        """A name for files; those of other seeds lie in other folders."""
        return file_name(f"{self.arm}-{self.part}")


def file_name(name: str) -> str:
    """`name` with a dash for whatever does not belong into a file's name."""
    return re.sub(r"[^\w.+-]", "-", name)


def rows_of_budget(order: np.ndarray, tokens: np.ndarray, share: float, by: By) -> np.ndarray:
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


def part_of_budget(share: float, by: By) -> str:
    """`Training.part` of an arm at a budget."""
    return f"{share:g}" if by == "rows" else f"{share:g}-{by}"


def tenth_part(place: int) -> str:
    """`Training.part` of a tenth, whose place is counted from 0."""
    return f"tenth-{place + 1}"


def arms_at_budgets(
    orders: Mapping[str, Sequence[np.ndarray]],
    tokens: np.ndarray,
    seeds: Sequence[int],
    budgets: Sequence[float],
    by: By,
    with_all: bool,
) -> list[Training]:
    """The arms at each budget. All of a seed follow each other, so that a seed is whole early.

    Args:
        orders: of each selector, by seed, the indices of the pool's rows, best first.
        tokens: [N] supervised tokens of the pool's rows.
    """
    trainings = []
    for number, seed in enumerate(seeds):
        for share in budgets:
            for name, of_seeds in orders.items():
                taken = rows_of_budget(of_seeds[number], tokens, share, by)
                trainings.append(Training(name, seed, part_of_budget(share, by), taken, share))
        if with_all:
            trainings.append(Training(ALL, seed, part_of_budget(1.0, "rows"), np.arange(len(tokens)), 1.0))
    return trainings


def tenths_of_rankings(orders: Mapping[str, Sequence[np.ndarray]], seeds: Sequence[int]) -> list[Training]:
    """A training on each tenth of each ranking. Arguments as for `arms_at_budgets`."""
    return [
        Training(name, seed, tenth_part(place), part)
        for name, of_seeds in orders.items()
        for seed, order in zip(seeds, of_seeds, strict=True)
        for place, part in enumerate(tenths(order))
    ]


def halves_of_pool(count: int, seeds: Sequence[int], number: int) -> list[Training]:
    """A training on each of `number` random halves of `count` rows, drawn anew for each seed."""
    return [
        Training(HALF, seed, str(place), half)
        for seed in seeds
        for place, half in enumerate(random_halves(count, number, seed))
    ]
