"""When rows are selected and which rows each optimizer step trains on: pure functions of the configuration,
the seed, the selections made so far and the step. So a resumed run needs nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex.config import RunConfig
from dataflex.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a `dynamic` run: random rows first, then a selection every `update_step` steps."""

    warmup_step: int
    update_step: int
    round_steps: int
    """E = warmup_step + update_step × update_times."""
    total_steps: int
    rows_per_step: int
    """T: rows of an optimizer step over all devices."""

    @property
    def rows_per_selection(self) -> int:
        return self.rows_per_step * self.update_step

    @property
    def selection_steps(self) -> list[int]:
        """The steps before which rows are selected."""
        return list(range(self.warmup_step, self.total_steps, self.update_step))

    def selection_of(self, step: int) -> int | None:
        """The step whose selection `step` trains on; None in the warm-up."""
        if step < self.warmup_step:
            return None
        return step - (step - self.warmup_step) % self.update_step


def dynamic_schedule(config: RunConfig) -> Schedule:
    """The schedule `config` asks of `dynamic`: ceil(num_train_epochs × E) steps, capped by max_steps and train_step."""
    round_steps = config.warmup_step + config.update_step * config.update_times
    if round_steps == 0:
        raise UsageError("warmup_step is 0 and update_times is 0: the run has no steps; raise one of them")
    # rounding first: 0.1 × 30 is 3.0000000000000004 in binary
    steps = math.ceil(round(config.num_train_epochs * round_steps, 9))
    caps = [cap for cap in (config.max_steps, config.train_step) if cap is not None and cap > 0]
    return Schedule(config.warmup_step, config.update_step, round_steps, min([steps, *caps]), config.rows_per_step)


def warmup_steps(config: RunConfig) -> int:
    """Optimizer steps of `warmup`: warmup_step, or max_steps."""
    steps = config.max_steps if config.max_steps > 0 else config.warmup_step
    if steps == 0:
        raise UsageError("warmup_step is 0: there is nothing to train; set warmup_step or max_steps")
    return steps


def training_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of `train`: num_train_epochs passes over `rows` rows, or max_steps."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(round(config.num_train_epochs * math.ceil(rows / config.rows_per_step), 9))


@functools.lru_cache(maxsize=4)
def _permutation(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def random_rows(step: int, rows_per_step: int, count: int, seed: int) -> list[int]:
    """Indices step `step` trains on: one shuffled pass over `count` rows after another, no row twice in a pass."""
    rows = []
    for position in range(step * rows_per_step, (step + 1) * rows_per_step):
        passed, index = divmod(position, count)
        rows.append(int(_permutation(count, (seed, 0, passed))[index]))
    return rows


def scheduled_rows(
    schedule: Schedule, step: int, count: int, seed: int, selections: Mapping[int, Sequence[int]]
) -> list[int]:
    """Indices step `step` of a `dynamic` run trains on: random ones, or its share of the shuffled selection."""
    selected_at = schedule.selection_of(step)
    if selected_at is None:
        return random_rows(step, schedule.rows_per_step, count, seed)
    chosen = selections[selected_at]
    order = _permutation(len(chosen), (seed, 1, selected_at))
    start = (step - selected_at) * schedule.rows_per_step
    return [chosen[index] for index in order[start : start + schedule.rows_per_step]]
