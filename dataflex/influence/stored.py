"""Scores from gradient stores: one pass over each training store, whatever the number of validation rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dataflex.errors import UsageError
from dataflex.files import scratch_array
from dataflex.influence.scores import ONE_SUBTASK, check_subtasks
from dataflex.progress import SILENT, Progress
from dataflex.store.reader import GradientStore, open_store

STRIPE_ROWS = 4096  # the work of a thread between two signs of progress


def stored_cosines(
    train: GradientStore,
    validation: GradientStore,
    progress: Progress = SILENT,
    *,
    per_row: bool = False,
    contrast: bool = False,
    scratch: Path | None = None,
) -> tuple[list[str], np.ndarray]:
    """Each training row's mean cosine with each subtask's rows: the subtasks' names, and [S, N] float32.

    Bad rows that were skipped have NaN, or have no part in the means. Products are summed in float32; a
    thread holds one tile of the training store at a time.

    Args:
        per_row: give the cosine with each validation row, [V, N], and the subtask of each; a bad one has NaN.
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
    starts = range(0, len(train), STRIPE_ROWS)
    with progress.task("scoring", len(train), "rows") as task, _one_thread_a_worker() as pool:
        for start, part in zip(starts, pool.map(lambda start: _stripe(train, queries, start), starts), strict=True):
            _require_finite(train, part)
            cosines[:, start : start + part.shape[1]] = part
            task.advance(part.shape[1])
    cosines[:, train.bad] = np.nan
    cosines[bad] = np.nan
    return names, cosines


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


def _stripe(store: GradientStore, queries: np.ndarray, start: int) -> np.ndarray:
    """Products [S, n] of `queries` [S, k] with the unit vectors of the rows from `start` on."""
    stop = min(start + STRIPE_ROWS, len(store))
    found = np.empty((len(queries), stop - start), dtype=np.float32)
    columns = torch.from_numpy(queries.T)
    for first, rows in store.tiles(start, stop):
        lengths = np.sqrt(np.vecdot(rows, rows))
        lengths[lengths == 0] = 1  # a bad row that was skipped
        found[:, first - start : first - start + len(rows)] = (torch.from_numpy(rows) @ columns).numpy().T / lengths
    return found


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


def open_pairs(
    train: Sequence[str | Path], validation: Sequence[str | Path]
) -> list[tuple[GradientStore, GradientStore]]:
    """The stores of each checkpoint, checked to be whole and comparable.

    Raises:
        UsageError: naming the stores and what is wrong: training and validation stores are swapped or mixed, the
            projection or the parameters differ within a pair, the rows or the direction between checkpoints.
    """
    if len(train) != len(validation):
        raise UsageError(
            f"{len(train)} training stores and {len(validation)} validation stores; "
            "give one of each per checkpoint, in order"
        )
    pairs = [(open_store(first), open_store(second)) for first, second in zip(train, validation, strict=True)]
    for ours, theirs in pairs:
        ours.require_sound()
        theirs.require_sound()
        _check_role(ours, "train", "--train")
        _check_role(theirs, "eval", "--eval")
        differing = ours.manifest.space_differences(theirs.manifest)
        if differing:
            raise UsageError(f"{ours.path} and {theirs.path} cannot be compared, they differ in {', '.join(differing)}")
        ours.require_whole()
        theirs.require_whole()
    first, first_validation = pairs[0]
    for ours, theirs in pairs[1:]:
        for one, other in ((first, ours), (first_validation, theirs)):
            _check_same_rows(one, other)
    return pairs


def _check_role(store: GradientStore, split: str, option: str) -> None:
    """Raise a UsageError unless a store holds the split that `option` asks for; one that another program made may
    not say."""
    found = store.manifest.split
    if found not in (None, split):
        raise UsageError(
            f"{option} {store.path} holds the gradients of {found} rows, not of {split} rows; did you swap them? "
            f"`dataflex grads --split {split}` writes the store that {option} takes"
        )


def _check_same_rows(one: GradientStore, other: GradientStore) -> None:
    """Raise a UsageError unless two stores hold the same rows and the same kind of direction."""
    if one.manifest.data != other.manifest.data or not np.array_equal(one.row, other.row):
        raise UsageError(f"{one.path} and {other.path} hold different rows; collect both from the same data")
    for name in ("gradient_type", "adam_formula"):
        before, after = one.manifest[name], other.manifest[name]
        if before != after:
            raise UsageError(
                f"{one.path} and {other.path} hold different directions, {name} {before} and {after}; "
                "scores of several checkpoints need the same one at each"
            )
