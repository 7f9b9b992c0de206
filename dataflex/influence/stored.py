"""Scores from gradient stores: one pass over each training store, whatever the number of validation rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataflex.errors import UsageError
from dataflex.files import scratch_array
from dataflex.influence.scores import ONE_SUBTASK, check_subtasks
from dataflex.progress import SILENT, Progress
from dataflex.store.reader import GradientStore

STRIPE_ROWS = 4096  # the work of a thread between two signs of progress


class StoredCosines(NamedTuple):
    """What the rows of a training store have to do with those of a validation store."""

    labels: list[str]
    """[Q] subtasks' names, or the subtask of each validation row."""
    values: np.ndarray
    """[Q, N] float32: each training row's mean cosine with a subtask's rows, or its cosine with a validation row."""
    first_half: np.ndarray | None
    """[S, N] float32: the part of `values` that the first half of the projected numbers adds. None for single
    validation rows, and where nothing was projected."""


def stored_cosines(
    train: GradientStore,
    validation: GradientStore,
    progress: Progress = SILENT,
    *,
    per_row: bool = False,
    contrast: bool = False,
    scratch: Path | None = None,
) -> StoredCosines:
    """Each training row's mean cosine with each subtask's rows.

    Bad rows that were skipped have NaN, or have no part in the means. Products are summed in float32; a
    thread holds one tile of the training store at a time.

    Args:
        per_row: give the cosine with each validation row; a bad one has NaN.
        contrast: take the mean cosine with the reference rows of the training store off every cosine.
        scratch: the folder for a file that holds the cosines where they are many; the system's when left out.

    Raises:
        UsageError: where a store is damaged, or has no reference rows to contrast with.
    """
    names, queries = _rows_of(validation) if per_row else _means_of(validation)
    _require_finite(validation, queries)
    bad = validation.bad if per_row else np.zeros(len(names), dtype=bool)
    if contrast:
        queries = queries - train.reference
    cosines = scratch_array((len(names), len(train)), np.float32, scratch)
    first_half = None
    if train.manifest.is_projected and not per_row:
        first_half = scratch_array(cosines.shape, np.float32, scratch)
    starts = range(0, len(train), STRIPE_ROWS)
    with progress.task("scoring", len(train), "rows") as task, _one_thread_a_worker() as pool:
        stripes = pool.map(lambda start: _stripe(train, queries, start), starts)
        for start, (part, of_first_half) in zip(starts, stripes, strict=True):
            _require_finite(train, part)
            cosines[:, start : start + part.shape[1]] = part
            if first_half is not None:
                first_half[:, start : start + part.shape[1]] = of_first_half
            task.advance(part.shape[1])
    cosines[:, train.bad] = np.nan
    cosines[bad] = np.nan
    return StoredCosines(names, cosines, first_half)


def _rows_of(validation: GradientStore) -> tuple[list[str], np.ndarray]:
    """The subtask of each validation row, and the rows as unit vectors [V, k] float32; a bad one is zero."""
    return validation.subtask or [ONE_SUBTASK] * len(validation), validation[:]


def _require_finite(store: GradientStore, made_of_it: np.ndarray) -> None:
    if not np.isfinite(made_of_it).all():
        raise UsageError(f"gradient store {store.path}: damaged, it holds numbers that are not finite")


@contextlib.contextmanager
def _one_thread_a_worker() -> Iterator[ThreadPoolExecutor]:
    """A worker a core; torch's own threads would only get in their way, over pieces as small as a tile."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _stripe(store: GradientStore, queries: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Products [Q, n] of `queries` [Q, k] with the unit vectors of the rows from `start` on, and the part of them that
    the first half of these vectors adds."""
    count, middle = min(STRIPE_ROWS, len(store) - start), store.dim // 2
    found, first_half = (np.empty((len(queries), count), np.float32) for _ in range(2))
    columns = torch.from_numpy(queries.T)
    for first, rows in store.tiles(start, start + count):
        lengths = np.sqrt(np.vecdot(rows, rows))
        lengths[lengths == 0] = 1  # a bad row that was skipped
        vectors, span = torch.from_numpy(rows), slice(first - start, first - start + len(rows))
        begun = vectors[:, :middle] @ columns[:middle]
        first_half[:, span] = begun.numpy().T / lengths
        found[:, span] = begun.addmm_(vectors[:, middle:], columns[middle:]).numpy().T / lengths
    return found, first_half


def _means_of(validation: GradientStore) -> tuple[list[str], np.ndarray]:
    """The mean unit vector of each subtask's rows, the bad ones left out: names in order, and [S, k] float32."""
    labels = np.array(validation.subtask or [ONE_SUBTASK] * len(validation))
    names, good = sorted(set(labels.tolist())), ~validation.bad
    counts = np.array([(good & (labels == name)).sum() for name in names])
    check_subtasks([name for name, count in zip(names, counts, strict=True) if count == 0])
    sums = np.zeros((len(names), validation.dim))
    for first, rows in validation.tiles(0, len(validation)):
        lengths = np.sqrt(np.vecdot(rows, rows))
        span = slice(first, first + len(rows))
        for index, name in enumerate(names):
            of_subtask = good[span] & (labels[span] == name)
            sums[index] += (rows[of_subtask] / lengths[of_subtask, None]).sum(axis=0, dtype=np.float64)
    return names, (sums / counts[:, None]).astype(np.float32)
