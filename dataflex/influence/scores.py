"""From cosines to one score a row.

Inf(z) = Σ_i η̄_i · agg_z′ cos(∇ℓ(z′; θ_i), Γ(z; θ_i)) (Xia et al., LESS, ICML 2024, arXiv 2402.04333).
The mean of cosines over a subtask's rows is the dot product with the mean of their unit vectors, so one
vector per (checkpoint, subtask) stands for any number of validation rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.data.examples import Example
from dataflex.data.rows import dataset_columns, row_numbers
from dataflex.errors import DataflexError, UsageError
from dataflex.files import scratch_array

if TYPE_CHECKING:
    import pandas

MIN_HELD = 1024
"""The fewest indices that a turn's order holds at a time."""

SHOWN = 5  # of the best rows
ONE_SUBTASK = "all"
"""The name of the only subtask where validation rows name none."""


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores of N rows, in row order."""

    row: np.ndarray
    """[N] int64: row numbers in the source."""
    score: np.ndarray
    """[N] float64; NaN for a bad row that was skipped, which no file lists and no selection takes"""
    subtasks: dict[str, np.ndarray]
    """[N] float64 for each subtask: Σ_i η̄_i · mean cosine."""
    dataset: list[str] | None = None
    """Each row's dataset, where several were named."""

    def to_pandas(self) -> pandas.DataFrame:
        """A line a row, in row order: `row`, `dataset` where several were named, `score`, and a column a subtask."""
        import pandas

        columns: dict[str, Any] = {"row": self.row}
        if self.dataset is not None:
            columns["dataset"] = self.dataset
        return pandas.DataFrame({**columns, "score": self.score, **self.subtasks})

    def __repr__(self) -> str:
        """How many rows, and the best of them as a table."""
        best = self.to_pandas().sort_values("score", ascending=False, kind="stable").head(SHOWN)
        return f"Scores of {len(self.row)} rows; the best are\n{best.to_string(index=False)}"


def normalise_weights(weights: Sequence[float]) -> list[float]:
    """η̄: weights divided by their sum. All zero (nothing learned yet) counts as equal."""
    total = math.fsum(weights)
    if total == 0:
        return [1 / len(weights)] * len(weights)
    return [weight / total for weight in weights]


def parse_weights(text: str, learning_rates: Sequence[float]) -> list[float]:
    """`lr`, `uniform` or numbers by comma, one per checkpoint, as weights that sum to 1.

    Raises:
        UsageError: on anything else, on the wrong count, and on learning rates that are all zero.
    """
    count = len(learning_rates)
    if text == "uniform":
        return normalise_weights([1.0] * count)
    if text == "lr":
        if not any(learning_rates):
            raise UsageError("weights lr: every checkpoint's learning rate is 0; use weights uniform")
        return normalise_weights(learning_rates)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"weights {text!r}: expected lr, uniform, or numbers by comma such as 0.6,0.4") from None
    if len(numbers) != count:
        raise UsageError(f"weights {text!r}: {len(numbers)} numbers for {count} checkpoints")
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or not any(numbers):
        raise UsageError(f"weights {text!r}: expected numbers of at least 0, not all 0")
    return normalise_weights(numbers)


def check_subtasks(empty: Sequence[str]) -> None:
    """Raise a DataflexError if any subtask is left with bad rows only."""
    if empty:
        raise DataflexError(f"subtask {empty[0]}: no validation row of it has a gradient to compare with")


def reduce_subtasks(values: np.ndarray, how: str) -> np.ndarray:
    """[S, N] to [N]: the `mean` or the `max` over subtasks."""
    return values.mean(axis=0) if how == "mean" else values.max(axis=0)


def round_robin(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[Q, N] to [N]: subtasks or validation rows take turns at picking their best row that is left; earlier picks score
    higher.

    Rows that are NaN stay so, and are not picked. The scores are 1 − position/N, so the n best are what n turns pick.
    Memory beside the values: N/16 indices for each of Q.
    """
    count = len(values[0])
    scores = np.full(count, np.nan)
    taken = np.zeros(count, dtype=bool)
    for row in values:
        taken |= np.isnan(row)
    left = int((~taken).sum())
    turns = itertools.cycle([_best_first(row, taken) for row in values])
    for position in range(left):
        pick = next(next(turns))
        taken[pick] = True
        scores[pick] = 1 - position / count
    return scores


def _best_first(row: np.ndarray, taken: np.ndarray) -> Iterator[int]:
    """Indices of `row` [N] that are not `taken`, the highest value first, equal values in order.

    `taken` may grow meanwhile. Only a part of the order is held at a time.
    """
    held = max(MIN_HELD, len(row) // 16)
    while len(left := np.flatnonzero(~taken)):
        values = row[left]
        if len(left) > held:
            keep = values >= np.partition(values, -held)[-held]
            left, values = left[keep], values[keep]
        order = left[np.argsort(-values, kind="stable")]
        for start in range(0, len(order), MIN_HELD):
            block = order[start : start + MIN_HELD]
            for index in block[~taken[block]].tolist():
                if not taken[index]:
                    yield index


def standardise(values: np.ndarray) -> None:
    """Give each row of `values` [Q, N] mean 0 and standard deviation 1, in place; NaN stays and has no part.

    A row of one value throughout becomes 0.
    """
    for row in values:  # one at a time: `values` may be larger than memory
        good = ~np.isnan(row)
        present = row[good].astype(np.float64)
        if len(present):
            spread = present.std()
            row[good] = (present - present.mean()) / spread if spread > 0 else 0


def subtask_means(labels: Sequence[str], values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names of the subtasks in order, and the mean [S, N] float32 over the rows of `values` [V, N] of each.

    A row that is NaN throughout, a validation row without a gradient, has no part.

    Raises:
        DataflexError: if no other row of a subtask is left.
    """
    names = sorted(set(labels))
    sums = np.zeros((len(names), values.shape[1]))
    counts = np.zeros(len(names))
    for label, row in zip(labels, values, strict=True):
        if not np.isnan(row).all():
            sums[names.index(label)] += row
            counts[names.index(label)] += 1
    check_subtasks([name for name, count in zip(names, counts, strict=True) if count == 0])
    return names, (sums / counts[:, None]).astype(np.float32)


def settle(
    labels: Sequence[str], values: np.ndarray, normalise: str | None, reduce: str
) -> tuple[list[str], np.ndarray]:
    """The cosines [V, N] with single validation rows at one checkpoint, as `influence` sums them over checkpoints:
    standardised for `normalise: rows`, and as [S, N] means of subtasks unless for `reduce: rows`."""
    if normalise == "rows":
        standardise(values)
    return (list(labels), values) if reduce == "rows" else subtask_means(labels, values)


def influence(
    cosines: Sequence[np.ndarray],
    weights: Sequence[float],
    how: str,
    labels: Sequence[str],
    scratch: Path | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sum over checkpoints.

    Args:
        cosines: for each checkpoint [Q, N], a row's mean cosine with each subtask, or for `rows` with each validation
            row.
        weights: η̄, summing to 1.
        how: `mean`, `max`, `round-robin` or `rows`. `mean` and `max` are taken at each checkpoint and then summed, as
            in the formula above; the other two rank the sums.
        labels: [Q] the subtask of each of `cosines`.
        scratch: the folder for a file that holds the sums for `rows` where they are many; the system's when left out.

    Returns:
        scores [N], and the weighted sum [N] of each subtask; float64.
    """
    if how == "rows":
        total = _sums_of_rows(weights, cosines, scratch)
        by_subtask = dict(zip(*subtask_means(labels, total), strict=True))
        return round_robin([row for row in total if not np.isnan(row).all()]), by_subtask
    total = weighted_sum(weights, cosines)
    by_subtask = dict(zip(labels, total, strict=True))
    if how == "round-robin":
        return round_robin(total), by_subtask
    reduced = [reduce_subtasks(values.astype(np.float64), how) for values in cosines]
    return weighted_sum(weights, reduced), by_subtask


def _sums_of_rows(weights: Sequence[float], cosines: Sequence[np.ndarray], scratch: Path | None) -> np.ndarray:
    """Σ weight · value in float32 [V, N], summed in float64; one row of it is in memory at a time."""
    if len(cosines) == 1:
        return cosines[0]  # the weights sum to 1
    total = scratch_array(cosines[0].shape, np.float32, scratch)
    for index in range(len(total)):
        total[index] = weighted_sum(weights, [values[index] for values in cosines])
    return total


def weighted_sum(weights: Sequence[float], values: Sequence[np.ndarray]) -> np.ndarray:
    """Σ weight · value in float64."""
    total = np.zeros(values[0].shape)
    for weight, value in zip(weights, values, strict=True):
        total += weight * value.astype(np.float64)
    return total


def scores_of(
    examples: Sequence[Example], several: bool, score: np.ndarray, by_subtask: Mapping[str, np.ndarray]
) -> Scores:
    """Arrays in the order of `examples` as Scores; `several` datasets are told apart by name."""
    names, source = dataset_columns(examples)
    return Scores(
        row=row_numbers(examples),
        score=score,
        subtasks=dict(by_subtask),
        dataset=[names[index] for index in source.tolist()] if several else None,
    )


def length_correlation(score: np.ndarray, tokens: np.ndarray) -> float | None:
    """Spearman's correlation of scores [N] with supervised tokens [N], rows without a score left out; None where one of
    both is the same throughout. Near 1, a selector likes long rows."""
    good = np.isfinite(score)
    return rank_correlation(score[good], tokens[good])


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's correlation of two arrays [N]; None where one of both is the same throughout."""
    if not len(one) or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """[N] the position of each value in ascending order; equal values share their mean position."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def ranking(row: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Indices from best to worst; equal scores in row order, NaN last."""
    return np.lexsort((row, -score))


def winners(scores: Scores) -> dict[str, tuple[int, int]]:
    """By subtask: how many rows score higher for it than for any other subtask, and the index of the row that scores
    highest for it. Of equal values the first subtask and the first row count."""
    highest, of = np.full(len(scores.row), -np.inf), np.full(len(scores.row), -1)
    for number, values in enumerate(scores.subtasks.values()):
        higher = values > highest  # never where it is NaN
        highest[higher], of[higher] = values[higher], number
    counts = np.bincount(of[of >= 0], minlength=len(scores.subtasks))
    best = [int(np.where(np.isnan(values), -np.inf, values).argmax()) for values in scores.subtasks.values()]
    return {name: (int(count), row) for name, count, row in zip(scores.subtasks, counts, best, strict=True)}


def best_rows(scores: Scores, count: int) -> list[int]:
    """Indices of the `count` best rows, best first.

    Raises:
        DataflexError: if so many bad rows were skipped that fewer are left.
    """
    best = ranking(scores.row, scores.score)[:count]
    left = int(np.isfinite(scores.score[best]).sum())
    if left < count:
        raise DataflexError(f"a selection takes {count} rows, but only {left} have a gradient that can be scored")
    return best.tolist()
