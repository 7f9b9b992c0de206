"""A pass over rows: batches by token budget → per-row gradients → Γ → a linear map, batch by batch.

Nothing here knows of files; the store and the exact scores both feed on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataflex import processes
from dataflex.cost import out_of_memory
from dataflex.data.batches import token_batches
from dataflex.data.examples import Example
from dataflex.data.rows import lengths_of
from dataflex.errors import DataflexError
from dataflex.gradients.backward import adapter_values, row_gradients
from dataflex.gradients.capture import Capture
from dataflex.gradients.direction import Direction
from dataflex.gradients.loss import row_losses
from dataflex.gradients.probe import groups_of
from dataflex.lora import Slot
from dataflex.progress import SILENT, Progress
from dataflex.projection.protocol import Projector

# The most float32 values that the projected rows of a batch take, and that a tensor's gradients of all its rows take:
# 1 GiB.
MAX_BATCH_FLOATS = 1 << 28
MAX_NAMED = 8


@dataclass(frozen=True)
class Projected:
    """One batch of a pass."""

    indices: list[int]
    """Which examples these are."""
    vectors: torch.Tensor
    """[rows, k] float32: the image of each row's direction; all zero for a bad row that was skipped."""
    loss: torch.Tensor
    """[rows] float32"""
    plain: torch.Tensor
    """[r, k] float32: the image of the plain gradient of each reference row of the batch, in the order of `indices`."""


def batches_of(capture: Capture, examples: Sequence[Example], dim: int) -> list[list[int]]:
    """Indices into `examples`, batch by batch: a function of the rows, the model, the token budget and `dim`, the
    width of what is kept of a row, alone. Every process must call this."""
    # what a row takes beside its tokens: its image, and the gradient of the largest tensor with Γ's temporaries
    most_rows = max(1, MAX_BATCH_FLOATS // max(dim, 4 * max(slot.size for slot in capture.slots)))
    return [
        batch[start : start + most_rows]
        for batch in batches_of_budget(capture, examples)
        for start in range(0, len(batch), most_rows)
    ]


def batches_of_budget(
    capture: Capture, examples: Sequence[Example], token_budget: int | None = None
) -> list[list[int]]:
    """Batches within the token budget (the capture's when left out), of rows that may share one. Every process must
    call this."""
    lengths = lengths_of(examples)
    return [
        np.take(group, batch).tolist()
        for group in groups_of(capture, examples)
        for batch in token_batches(lengths[group], token_budget or capture.token_budget)
    ]


def project_rows(
    capture: Capture,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    direction: Direction,
    projector: Projector,
    progress: Progress = SILENT,
    description: str = "gradients",
    done: int = 0,
    skip_bad: bool = False,
    reference: Collection[int] = (),
) -> Iterator[Projected]:
    """Take this process's share of the batches through `projector`, one batch a turn.

    Every process yields as many times: one without a batch left in the last turn yields one of no rows. The
    model is as it was between the batches as well as at the end. `done` rows stand behind it already. Of the rows
    whose indices are in `reference` the plain gradient is projected as well.

    Raises:
        DataflexError: naming the row whose direction is not finite or all zero, unless such are skipped.
    """
    values = [(a.to(capture.device), b.to(capture.device)) for a, b in adapter_values(capture.pairs)]
    too_large, losses, seen = math.inf, 0.0, 0
    with progress.task(description, done + sum(len(batch) for batch in batches), "rows", done) as task:
        for turn, batch in enumerate(processes.my_turns(batches)):
            rows = [_Row(examples[index], index in reference) for index in batch or []]
            if rows:
                vectors, loss, plain, too_large = _project_what_fits(
                    capture, rows, values, direction, projector, progress, too_large
                )
                bad = _bad_rows(vectors)
                if bad and not skip_bad:
                    raise _bad_row_error(rows[bad[0]].example, vectors[bad[0]])
                vectors[bad] = 0
            else:
                if capture.shared_weights:  # gathering them takes every process
                    _project_batch(capture, [_Row(examples[batches[-1][0]], False)], values, direction, projector)
                vectors, loss, plain = torch.zeros(0, projector.dim), torch.zeros(0), torch.zeros(0, projector.dim)
            yield Projected(batch or [], vectors, loss, plain)
            together = batches[turn * processes.size() : (turn + 1) * processes.size()]
            losses, seen = losses + loss.nansum().item(), seen + len(rows)
            processes.advance(task, sum(len(batch) for batch in together), loss=losses / max(1, seen))


@dataclass(frozen=True)
class _Row:
    """A row of a batch."""

    example: Example
    is_reference: bool


def _project_what_fits(
    capture: Capture,
    rows: list[_Row],
    values: list[tuple[torch.Tensor, torch.Tensor]],
    direction: Direction,
    projector: Projector,
    progress: Progress,
    too_large: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """`_project_batch` in as many parts as memory asks for; and the tokens that did not fit.

    Raises:
        DataflexError: where a single row does not fit, or where ZeRO-3 has all processes take the same passes.
    """
    waiting, made = [rows], []
    while waiting:
        part = waiting.pop()
        tokens = len(part) * max(len(row.example.input_ids) for row in part)
        if tokens >= too_large and len(part) > 1:
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            continue
        try:
            made.append(_project_batch(capture, part, values, direction, projector))
            continue
        except RuntimeError as error:  # what was allocated is freed only once the error is gone
            if not out_of_memory(error):
                raise
        if capture.shared_weights or len(part) == 1:
            raise DataflexError(
                f"out of memory over {tokens} tokens (row {part[0].example.row} of {part[0].example.dataset} is the "
                "longest); " + ("lower cutoff_len" if len(part) == 1 else "set token_budget lower")
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        too_large = tokens
        waiting.append(part)
        progress.say(f"out of memory over {tokens} tokens; going on with half as many")
    vectors, losses, plain = (torch.cat(parts) for parts in zip(*made, strict=True))
    return vectors, losses, plain, too_large


def _project_batch(
    capture: Capture,
    rows: list[_Row],
    values: list[tuple[torch.Tensor, torch.Tensor]],
    direction: Direction,
    projector: Projector,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The images of the rows' directions, their losses, and the images of the reference rows' plain gradients."""
    vectors = torch.zeros(len(rows), projector.dim, device=capture.device)
    reference = [position for position, row in enumerate(rows) if row.is_reference]
    plain = torch.zeros(len(reference), projector.dim, device=capture.device)

    def on_gradient(slot: Slot, gradient: torch.Tensor) -> None:
        if reference:  # first: a direction may overwrite the gradient
            projector.add(plain, slot.offset, gradient[reference])
        projector.add(vectors, slot.offset, direction(slot, gradient))

    with capture.running():
        losses = row_gradients(
            capture.model,
            capture.pairs,
            capture.slots,
            values,
            *capture.inputs([row.example for row in rows]),
            on_gradient,
            fused=capture.fused,
            position_losses=capture.position_losses,
        )
    return vectors, losses.loss, plain


def _bad_rows(vectors: torch.Tensor) -> list[int]:
    """Which rows are all zero or not finite: nothing can be said of their direction."""
    norms = vectors.norm(dim=1)
    return (~((norms > 0) & norms.isfinite())).nonzero()[:, 0].tolist()


def _bad_row_error(row: Example, vector: torch.Tensor) -> DataflexError:
    what = "all zero" if vector.norm() == 0 else "not finite"
    return DataflexError(
        f"row {row.row} of {row.dataset}: its gradient is {what}; "
        "remove the row, lower the learning rate, or give --skip-bad-rows"
    )


def name_bad_rows(rows: Sequence[Example]) -> str:
    """What is said of the bad rows that were skipped."""
    named = ", ".join(f"row {row.row} of {row.dataset}" for row in rows[:MAX_NAMED])
    more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
    return f"skipped, their gradient is all zero or not finite: {named}{more}"


def forward_rows(
    capture: Capture,
    examples: Sequence[Example],
    compute: Callable[[list[Example], torch.Tensor, torch.Tensor], torch.Tensor],
    progress: Progress = SILENT,
    description: str = "rows",
    batches: Sequence[list[int]] | None = None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Take this process's share of the rows through `compute`, (rows, input_ids, labels [rows, T]) → [rows, …],
    without gradients: the indices of each batch, and its values. `batches` are some of all when given.

    Every process yields as many times: one without a batch left in the last turn yields one of no rows.
    """
    batches = batches_of_budget(capture, examples) if batches is None else batches
    with progress.task(description, sum(map(len, batches)), "rows") as task:
        for turn, batch in enumerate(processes.my_turns(batches)):
            values = torch.zeros(0)
            if batch is not None or capture.shared_weights:
                rows = [examples[index] for index in batch or batches[-1][:1]]
                with capture.running(), torch.no_grad():
                    values = compute(rows, *capture.inputs(rows))
            yield batch or [], values if batch is not None else values[:0]
            together = batches[turn * processes.size() : (turn + 1) * processes.size()]
            processes.advance(task, sum(len(batch) for batch in together))


def losses_of(capture: Capture) -> Callable[[list[Example], torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean cross-entropy [rows] of each row of a batch, for `forward_rows`."""
    position_losses = capture.position_losses
    return lambda rows, input_ids, labels: row_losses(capture.model, input_ids, labels, position_losses).loss


def mean_loss(
    capture: Capture, examples: Sequence[Example], progress: Progress = SILENT, description: str = "loss"
) -> float:
    """Mean over `examples` of each row's mean cross-entropy: forward passes only, shared by all processes."""
    total = torch.zeros(1, dtype=torch.float64)
    for _, losses in forward_rows(capture, examples, losses_of(capture), progress, description):
        total += losses.sum().item()
    processes.sum_over([total])
    return total.item() / len(examples)


def losses_of_rows(capture: Capture, examples: Sequence[Example], progress: Progress, description: str) -> np.ndarray:
    """[N] each row's mean cross-entropy, in every process: forward passes only, shared by all processes."""
    rows = forward_rows(capture, examples, losses_of(capture), progress, description)
    return gathered_rows(rows, np.zeros(len(examples), dtype=np.float32))


def gathered_rows(rows: Iterable[tuple[list[int], torch.Tensor]], out: np.ndarray) -> np.ndarray:
    """Fill `out` [N, …] with what every process's `forward_rows` yields; the same in every process."""
    for indices, values in rows:
        for share, part in processes.gather((indices, values.float().cpu().numpy())):
            out[share] = part
    out[:] = processes.broadcast(out)
    return out
