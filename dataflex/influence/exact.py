"""Scores without a projection: the validation directions are kept whole, and every training direction is
dotted with them while it passes. No store, no approximation, less work than any projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dataflex import processes
from dataflex.cost import free_memory
from dataflex.data.examples import Example
from dataflex.errors import DataflexError
from dataflex.files import scratch_array
from dataflex.gradients.capture import Capture
from dataflex.gradients.direction import Direction, plain_direction
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.influence.scores import ONE_SUBTASK, check_subtasks
from dataflex.progress import SILENT, Progress
from dataflex.projection.identity import Identity
from dataflex.projection.queries import Queries


def exact_cosines(
    capture: Capture,
    train: Sequence[Example],
    validation: Sequence[Example],
    train_direction: Direction,
    validation_direction: Direction,
    progress: Progress = SILENT,
    skip_bad: bool = False,
    *,
    per_row: bool = False,
    reference: Mapping[int, float] | None = None,
    scratch: Path | None = None,
) -> tuple[list[str], np.ndarray]:
    """Each training row's mean cosine with each subtask's rows: the subtasks' names, and [S, N] float32.

    With `skip_bad`, a row whose direction is all zero or not finite has NaN, or has no part in the means.

    Memory beyond the model: S × P float32 for the subtasks' mean directions. Where they do not fit, the training rows
    pass once for as many subtasks as do.

    Args:
        per_row: give the cosine with each validation row, [V, N], and the subtask of each; a bad one has NaN.
        reference: training rows by index, with weights; the mean cosine with their plain gradients is taken off every
            cosine.
        scratch: the folder for a file that holds the cosines where they are many; the system's when left out.

    Raises:
        DataflexError: where not even one direction fits.
    """
    labels = [example.subtask or ONE_SUBTASK for example in validation]
    members = (
        [[index] for index in range(len(labels))]
        if per_row
        else [[index for index, label in enumerate(labels) if label == name] for name in sorted(set(labels))]
    )
    reference = reference or {}
    taken_off = _mean_unit(
        capture,
        [[train[index] for index in reference]],
        plain_direction,
        progress,
        "reference gradients",
        skip_bad,
        list(reference.values()),
    )
    cosines = scratch_array((len(members), len(train)), np.float32, scratch)
    at_once = _queries_that_fit(capture, len(members))
    for start in range(0, len(members), at_once):
        group = members[start : start + at_once]
        rows = [[validation[index] for index in query] for query in group]
        means = _mean_unit(capture, rows, validation_direction, progress, "eval gradients", skip_bad)
        if not per_row:
            check_subtasks([labels[query[0]] for query, mean in zip(group, means, strict=True) if mean.isnan().any()])
        _fill(cosines[start : start + at_once], capture, train, train_direction, means - taken_off, progress, skip_bad)
    return [labels[query[0]] for query in members], cosines


def _queries_that_fit(capture: Capture, wanted: int) -> int:
    """How many vectors [P] the first process's device has room for; at most `wanted`. Collective."""
    bytes_each, free = 4 * capture.parameters, free_memory(capture.device)
    fitting = processes.broadcast(min(wanted, free // bytes_each))
    if fitting < 1:
        raise DataflexError(
            f"exact scores keep a direction of {capture.parameters} numbers: {bytes_each / 1e9:.3g} GB are needed and "
            f"{free / 1e9:.3g} GB are free; use proj_dim=8192"
        )
    return fitting


def _mean_unit(
    capture: Capture,
    groups: Sequence[Sequence[Example]],
    direction: Direction,
    progress: Progress,
    description: str,
    skip_bad: bool,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """The mean unit direction of each group of rows, [groups, P] float32; zero where there are no rows, NaN for a group
    of bad rows only. `weights` are the rows', 1 when left out. Collective."""
    sums = torch.zeros(len(groups), capture.parameters, device=capture.device)
    counts = torch.zeros(len(groups), 1, device=capture.device)
    rows = [row for group in groups for row in group]
    if not rows:
        return sums
    owner = [number for number, group in enumerate(groups) for _ in group]
    identity = Identity(capture.parameters)
    batches = batches_of(capture, rows, identity.dim)
    for batch in project_rows(capture, rows, batches, direction, identity, progress, description, skip_bad=skip_bad):
        for index, vector in zip(batch.indices, batch.vectors, strict=True):
            length = vector.norm()
            if length > 0:
                weight = weights[index] if weights else 1.0
                sums[owner[index]].add_(vector / length, alpha=weight)
                counts[owner[index]] += weight
    processes.sum_over([sums, counts])
    return sums / counts


def _fill(
    cosines: np.ndarray,
    capture: Capture,
    train: Sequence[Example],
    direction: Direction,
    queries: torch.Tensor,
    progress: Progress,
    skip_bad: bool,
) -> None:
    """Write every training row's products with `queries` [Q, P] to `cosines` [Q, N], the same in every process."""
    projector = Queries(queries)
    batches = batches_of(capture, train, projector.dim)
    for rows in project_rows(
        capture, train, batches, direction, projector, progress, "train gradients", skip_bad=skip_bad
    ):
        products = rows.vectors[:, :-1] / rows.vectors[:, -1:].sqrt()
        for indices, values in processes.gather((rows.indices, products.T.cpu().numpy())):
            cosines[:, indices] = values
    cosines[:] = processes.broadcast(cosines)
