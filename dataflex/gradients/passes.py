"""A pass over rows: batches by token budget → per-row gradients → Γ → a linear map, batch by batch.

Nothing here knows of files; the store and the exact scores both feed on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dataflex import processes
from dataflex.data.batches import collate, token_batches
from dataflex.data.examples import Example
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.capture import adapter_values, row_gradients, row_losses, undisturbed
from dataflex.gradients.direction import Direction
from dataflex.gradients.projection import Projector
from dataflex.lora import LoraPair, Slot, layout, lora_pairs
from dataflex.model import device
from dataflex.progress import SILENT, Progress

# Projected rows of one batch never take more than this many numbers (1 GiB of float32).
MAX_BATCH_NUMBERS = 1 << 28
MAX_NAMED = 8


@dataclass(frozen=True)
class Pass:
    """How gradients are taken from a model: fixed for a whole pass."""

    model: nn.Module
    pairs: list[LoraPair]
    slots: list[Slot]
    dtype: torch.dtype
    """Of the matrix products; below float32 they run under autocast, as in training."""
    pad_token_id: int
    token_budget: int

    @property
    def parameters(self) -> int:
        """P, the length of the flat parameter vector."""
        return self.slots[-1].offset + self.slots[-1].size

    @property
    def device(self) -> torch.device:
        # ZeRO-3 may keep parameters elsewhere than where they are computed with
        return device() if self.shared_weights else self.slots[0].parameter.device

    @property
    def shared_weights(self) -> bool:
        """True under ZeRO-3, where every forward pass takes every process."""
        return hasattr(self.slots[0].parameter, "ds_id")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@dataclass(frozen=True)
class Projected:
    """One batch of a pass."""

    indices: list[int]
    """Which examples these are."""
    vectors: torch.Tensor
    """[rows, k] float32: the image of each row's direction; all zero for a bad row that was skipped."""
    loss: torch.Tensor
    """[rows] float32"""


def make_pass(model: nn.Module, dtype: torch.dtype, pad_token_id: int, token_budget: int) -> Pass:
    """The pass over `model`'s LoRA pairs.

    Raises:
        UsageError: for float16, which flushes gradients below 6e-8 to zero; training scales its loss against that.
    """
    if dtype == torch.float16:
        raise UsageError("fp16: gradients of single rows underflow in float16; use bf16=true, or neither")
    pairs = lora_pairs(model)
    return Pass(model, pairs, layout(pairs), dtype, pad_token_id, token_budget)


def batches_of(examples: Sequence[Example], token_budget: int, dim: int) -> list[list[int]]:
    """Indices into `examples`, batch by batch: a function of the rows and the arguments alone."""
    most_rows = max(1, MAX_BATCH_NUMBERS // dim)
    batches = token_batches([len(example.input_ids) for example in examples], token_budget)
    return [batch[start : start + most_rows] for batch in batches for start in range(0, len(batch), most_rows)]


def project_rows(
    run: Pass,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    direction: Direction,
    projector: Projector,
    progress: Progress = SILENT,
    description: str = "gradients",
    done: int = 0,
    skip_bad: bool = False,
) -> Iterator[Projected]:
    """Take this process's share of the batches through `projector`, one batch a turn.

    Every process yields as many times: one without a batch left in the last turn yields one of no rows. The
    model is as it was between the batches as well as at the end. `done` rows stand behind it already.

    Raises:
        DataflexError: naming the row whose direction is not finite or all zero, unless such are skipped.
    """
    values = [(a.to(run.device), b.to(run.device)) for a, b in adapter_values(run.pairs)]
    with progress.task(description, done + sum(len(batch) for batch in batches), "rows") as task:
        if done:
            task.advance(done)
        for turn, batch in enumerate(processes.my_turns(batches)):
            rows = [examples[index] for index in batch or []]
            if rows:
                vectors, loss = _project_batch(run, rows, values, direction, projector)
                bad = _bad_rows(vectors)
                if bad and not skip_bad:
                    raise _bad_row_error(rows[bad[0]], vectors[bad[0]])
                vectors[bad] = 0
            else:
                if run.shared_weights:  # gathering them takes every process
                    _project_batch(run, [examples[batches[-1][0]]], values, direction, projector)
                vectors, loss = torch.zeros(0, projector.dim), torch.zeros(0)
            yield Projected(batch or [], vectors, loss)
            together = batches[turn * processes.size() : (turn + 1) * processes.size()]
            shown = {"loss": loss.mean().item()} if rows else {}
            processes.advance(task, sum(len(batch) for batch in together), **shown)


def _project_batch(
    run: Pass,
    rows: list[Example],
    values: list[tuple[torch.Tensor, torch.Tensor]],
    direction: Direction,
    projector: Projector,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = collate(rows, run.pad_token_id)
    vectors = torch.zeros(len(rows), projector.dim, device=run.device)

    def on_gradient(slot: Slot, gradient: torch.Tensor) -> None:
        projector.add(vectors, slot.offset, direction(slot, gradient))

    with undisturbed(run.model), run.autocast():
        losses = row_gradients(
            run.model,
            run.pairs,
            run.slots,
            values,
            inputs["input_ids"].to(run.device),
            inputs["labels"].to(run.device),
            on_gradient,
        )
    return vectors, losses.loss


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


def mean_loss(run: Pass, examples: Sequence[Example], progress: Progress = SILENT, description: str = "loss") -> float:
    """Mean over `examples` of each row's mean cross-entropy: forward passes only, shared by all processes."""
    batches = token_batches([len(example.input_ids) for example in examples], run.token_budget)
    total = torch.zeros(1, dtype=torch.float64)
    with progress.task(description, len(examples), "rows") as task:
        for turn, batch in enumerate(processes.my_turns(batches)):
            if batch is not None or run.shared_weights:
                inputs = collate([examples[index] for index in batch or batches[-1][:1]], run.pad_token_id)
                with undisturbed(run.model), run.autocast(), torch.no_grad():
                    losses = row_losses(run.model, inputs["input_ids"].to(run.device), inputs["labels"].to(run.device))
                if batch is not None:
                    total += losses.loss.sum().item()
            together = batches[turn * processes.size() : (turn + 1) * processes.size()]
            processes.advance(task, sum(len(batch) for batch in together))
    processes.sum_over([total])
    return total.item() / len(examples)
