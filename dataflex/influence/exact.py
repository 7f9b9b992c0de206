"""Scores without a projection: the validation directions are kept whole, and every training direction is
dotted with them while it passes. No store, no approximation, less work than any projection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dataflex import processes
from dataflex.cost import free_memory
from dataflex.data.examples import Example
from dataflex.errors import DataflexError
from dataflex.gradients.capture import Capture
from dataflex.gradients.direction import Direction
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
) -> tuple[list[str], np.ndarray]:
    """Each training row's mean cosine with each subtask's rows: names, and [S, N] float32.

    With `skip_bad`, a row whose direction is all zero or not finite has NaN, or has no part in the means.

    Memory beyond the model: S × P float32 for the subtasks' mean directions.

    Raises:
        DataflexError: where they do not fit.
    """
    names = sorted({example.subtask or ONE_SUBTASK for example in validation})
    needed, free = 4 * len(names) * capture.parameters, free_memory(capture.device)
    if needed > free:
        raise DataflexError(
            f"exact scores keep a direction of {capture.parameters} numbers for each of {len(names)} subtasks: "
            f"{needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free; use proj_dim=8192"
        )
    queries = torch.zeros(len(names), capture.parameters, device=capture.device)
    counts = torch.zeros(len(names), 1, device=capture.device)
    identity = Identity(capture.parameters)
    batches = batches_of(capture, validation, identity.dim)
    for rows in project_rows(
        capture, validation, batches, validation_direction, identity, progress, "eval gradients", skip_bad=skip_bad
    ):
        for index, vector in zip(rows.indices, rows.vectors, strict=True):
            length = vector.norm()
            if length == 0:
                continue
            place = names.index(validation[index].subtask or ONE_SUBTASK)
            queries[place].add_(vector / length)
            counts[place] += 1
    processes.sum_over([queries, counts])
    check_subtasks([name for name, count in zip(names, counts, strict=True) if count == 0])
    queries /= counts

    cosines = np.empty((len(names), len(train)), dtype=np.float32)
    projector = Queries(queries)
    batches = batches_of(capture, train, projector.dim)
    for rows in project_rows(
        capture, train, batches, train_direction, projector, progress, "train gradients", skip_bad=skip_bad
    ):
        products = rows.vectors[:, :-1] / rows.vectors[:, -1:].sqrt()
        for indices, values in processes.gather((rows.indices, products.T.cpu().numpy())):
            cosines[:, indices] = values
    return names, processes.broadcast(cosines)
