"""Held-out rows that stand in other data as well, word for word or nearly so.

Rows are compared by their tokens. Two rows are near-duplicates where the sets of their SHINGLE tokens in a row have a
Jaccard index of at least NEAR (Broder 1997, "On the resemblance and containment of documents"). Shingles that more than
half of the held-out rows have, or more than MOST_HOLDERS of them, such as a system text, are left out of both sets.
They tell no rows apart, and every other row that has one would be compared with all their holders.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex.data.rows import Example, dataset_columns, iter_tokens, row_numbers
from dataflex.errors import UsageError
from dataflex.progress import Progress

SHINGLE = 5
NEAR = 0.8
MOST_HOLDERS = 20
MOST_NAMED = 3


@dataclass(frozen=True)
class Overlap:
    """A held-out row and a row of other data that is like it."""

    index: int
    """Of the held-out row among the held-out rows."""
    other: int
    """Of the other row among the other rows."""
    likeness: float
    """The Jaccard index; 1 where all tokens are the same."""


def find_overlaps(held_out: Sequence[Example], others: Sequence[Example], progress: Progress) -> list[Overlap]:
    """For each held-out row that has one, the most alike of the `others` at NEAR or above; the first of equals."""
    starts, tokens = _together(held_out)
    wanted = _shingles(starts, tokens)
    shingles, holders = np.unique(wanted[1], return_counts=True)
    common = shingles[holders > max(1, min(len(held_out) // 2, MOST_HOLDERS))]
    wanted = _without(wanted, common)
    whole: dict[bytes, list[int]] = {}
    for index, row in enumerate(_hashes_of_rows(starts, tokens)):
        whole.setdefault(row, []).append(index)
    best: dict[int, Overlap] = {}

    def consider(index: int, other: int, likeness: float) -> None:
        if index not in best or likeness > best[index].likeness:
            best[index] = Overlap(index, other, likeness)

    position = 0
    with progress.task("looking for held-out rows", len(others), "rows") as task:
        for starts, tokens in iter_tokens(others):
            for other, row in enumerate(_hashes_of_rows(starts, tokens), start=position):
                for index in whole.get(row, []):
                    consider(index, other, 1.0)
            for index, other, likeness in _near_pairs(wanted, _without(_shingles(starts, tokens), common)):
                consider(index, position + other, likeness)
            position += len(starts) - 1
            task.advance(len(starts) - 1)
    return [best[index] for index in sorted(best)]


def _near_pairs(wanted: np.ndarray, found: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The row in `wanted`, the row in `found` and the Jaccard index of every pair at NEAR or above.

    Args:
        wanted: [2, M] a row's index and a shingle's hash, as `_shingles` gives them.
        found: [2, K] the same of the other rows.
    """
    rows, others = wanted[0].astype(np.int64), found[0].astype(np.int64)
    sizes, other_sizes = np.bincount(rows), np.bincount(others)
    order = np.argsort(wanted[1], kind="stable")
    first, last = (np.searchsorted(wanted[1], found[1], side, sorter=order) for side in ("left", "right"))
    times = last - first
    # the places first … last − 1 of every found shingle, one after another
    places = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + np.repeat(first, times)
    count = max(1, len(other_sizes))
    pairs, shared = np.unique(rows[order][places] * count + np.repeat(others, times), return_counts=True)
    held, other = np.divmod(pairs, count)
    likeness = shared / (sizes[held] + other_sizes[other] - shared)
    near = likeness >= NEAR
    yield from zip(held[near].tolist(), other[near].tolist(), likeness[near].tolist(), strict=True)


def refuse_overlaps(held_out: Sequence[Example], others: Sequence[Example], what: str, progress: Progress) -> None:
    """Raise a UsageError that names the first held-out rows which stand in `others`, the rows of `what`."""
    found = find_overlaps(held_out, others, progress)
    if not found:
        return
    rows, other_rows = row_numbers(held_out), row_numbers(others)
    (names, source), (other_names, other_source) = dataset_columns(held_out), dataset_columns(others)
    named = "; ".join(
        f"row {rows[one.index]} of {names[source[one.index]]} is "
        f"{'' if one.likeness == 1 else f'{one.likeness:.0%} '}row {other_rows[one.other]} of "
        f"{other_names[other_source[one.other]]}"
        for one in found[:MOST_NAMED]
    )
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    raise UsageError(
        f"{len(found)} of {len(held_out)} held-out rows stand in {what} as well ({named}{more}); a model does better "
        "on rows that it has seen. Take them out, or give --allow-overlap"
    )


def _shingles(starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[2, M] uint64: a row's index and a shingle's hash, each pair once."""
    lengths = np.diff(starts)
    windows = len(tokens) - SHINGLE + 1
    if windows <= 0:
        return np.zeros((2, 0), dtype=np.uint64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    hashes = np.zeros(windows, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = _mixed(hashes ^ tokens[offset : offset + windows].astype(np.uint64))
    within = row[:windows] == row[SHINGLE - 1 :]  # a window that does not reach into the next row
    pairs = np.stack([row[:windows][within].astype(np.uint64), hashes[within]])
    order = np.lexsort((pairs[1], pairs[0]))
    pairs = pairs[:, order]
    new = np.ones(pairs.shape[1], dtype=bool)
    new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    return pairs[:, new]


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 of each of `values` (Steele, Lea and Flood 2014): a one-to-one map that spreads every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _without(pairs: np.ndarray, common: np.ndarray) -> np.ndarray:
    return pairs[:, ~np.isin(pairs[1], common)]


def _together(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of the rows as `iter_tokens` gives those of some."""
    parts = list(iter_tokens(examples))
    lengths = np.concatenate([np.diff(starts) for starts, _ in parts])
    return np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([tokens for _, tokens in parts])


def _hashes_of_rows(starts: np.ndarray, tokens: np.ndarray) -> list[bytes]:
    import xxhash

    return [xxhash.xxh3_128_digest(tokens[start:end].tobytes()) for start, end in itertools.pairwise(starts)]
