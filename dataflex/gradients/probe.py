"""What a model is asked before its gradients are taken: can they be, and which rows may share a batch.

Both are found out by running a few rows, not by the model's type: rotary frequencies that switch at a length, buffers
that remember the longest row, kernels that read a weight past its adapter and code from the hub all show there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from dataflex import processes
from dataflex.cost import out_of_memory
from dataflex.data.examples import Example
from dataflex.data.rows import lengths_of
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.backward import TokensMixed, adapter_values, row_gradients
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.forward_state import ForwardState
from dataflex.gradients.loss import row_losses, whole_losses
from dataflex.lora import Slot
from dataflex.progress import SILENT, Progress

# Relative differences that rounding explains: of a row's losses, and of its gradient taken in two ways.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.25}
MAX_SWITCHES = 3


TRYING = "trying the model: which rows may share a batch, and the gradients of two rows"
"""What is said before `check_capture` by whoever has a reader: it takes seconds."""


def check_gradients(
    model: torch.nn.Module,
    dtype: torch.dtype,
    pad_token_id: int,
    examples: Sequence[Example],
    progress: Progress = SILENT,
) -> None:
    """`check_capture` of a model that is to be trained. A float16 model's gradients are taken in bfloat16."""
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    check_capture(make_capture(model, dtype, pad_token_id, token_budget=1), examples, progress)


def check_capture(capture: Capture, examples: Sequence[Example], progress: Progress = SILENT) -> None:
    """Take the gradients of two rows, forward and backward, and compare one of them with autograd's.

    Says so where not all rows can share a batch. Every process must call this. Under ZeRO-3, where the model runs only
    inside its training, the rows' gradients are taken and not compared.

    Raises:
        UsageError: if the gradients of this model with this adapter cannot be taken.
    """
    groups = groups_of(capture, examples)
    last = np.array(groups[-1])
    shortest = last[np.argsort(lengths_of(examples)[last], kind="stable")]
    rows = [examples[index] for index in shortest[:2].tolist()]
    with _naming_the_longest(rows):
        with _noting_calls(capture) as called:
            found = _first_gradient(capture, rows)
        # under ZeRO-3 a backward pass of autograd's alone leaves gathered weights behind
        wanted = found if is_shared_out(capture.model) else _autograd_gradient(capture, rows[0])
    for pair in capture.pairs:
        if _last_name(pair.name) not in called:
            raise UsageError(
                f"lora_target: {_last_name(pair.name)} is never called in a forward pass of this model, so an adapter "
                "on it does nothing; take it out of lora_target"
            )
    difference = (found - wanted).norm()
    if difference > GRADIENT_TOLERANCE[capture.dtype] * wanted.norm():
        raise UsageError(
            f"row {rows[0].row} of {rows[0].dataset}: its gradient differs from autograd's by "
            f"{difference / wanted.norm():.2g} of its length, so this model's gradients cannot be taken; "
            "name fewer modules in lora_target"
        )
    if len(groups) == len(examples) > 1:
        progress.say("rows run one at a time: layers of this model mix the tokens of a batch")
    elif len(groups) > 1:
        progress.say(
            f"rows share a batch within {len(groups)} ranges of length only: this model's forward pass depends on the "
            "padded length"
        )


def is_shared_out(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has shared out the weights of `model`."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def groups_of(capture: Capture, examples: Sequence[Example]) -> list[list[int]]:
    """Indices into `examples` in groups whose rows may share a batch, the longest rows' group first.

    A row of such a batch has the numbers that it has alone. Running a few rows alone and padded beside others tells,
    so the groups are a function of the model and the rows alone. Every process must call this.

    Raises:
        UsageError: if a row's numbers depend on the rows that ran before it.
    """
    with _naming_the_longest(examples):
        return processes.broadcast(_groups(capture, examples))


def _groups(capture: Capture, examples: Sequence[Example]) -> list[list[int]]:
    if len(examples) < 2:
        return [list(range(len(examples)))]
    by_row = lengths_of(examples)
    order = np.argsort(by_row, kind="stable")
    lengths, starts = np.unique(by_row[order], return_index=True)
    by_length = dict(zip(lengths.tolist(), np.split(order, starts[1:]), strict=True))
    ascending = lengths.tolist()

    def alike(short: int, long: int) -> bool:
        """Whether the first row of length `short` runs beside the last one of length `long` as it runs alone."""
        row, other = examples[int(by_length[short][0])], examples[int(by_length[long][-1])]
        alone, beside = _FirstRow(capture, [row]), _FirstRow(capture, [row, other])
        if not alone.is_like(_FirstRow(capture, [row])):
            raise UsageError(
                f"row {row.row} of {row.dataset}: its loss depends on the rows that ran before it, so this model's "
                "gradients cannot be taken"
            )
        return alone.is_like(beside)

    ranges = length_ranges(ascending, alike)
    crowded = [length for length in ascending if len(by_length[length]) > 1]
    told_apart = not capture.pairs or not _mixes_tokens(capture, [examples[index] for index in order[:2].tolist()])
    if not told_apart or (crowded and len(ranges) > 1 and not alike(crowded[0], crowded[0])):
        return [[index] for length in reversed(ascending) for index in by_length[length].tolist()]
    return [np.sort(np.concatenate([by_length[length] for length in group])).tolist() for group in reversed(ranges)]


def length_ranges(lengths: list[int], alike: Callable[[int, int], bool]) -> list[list[int]]:
    """`lengths`, ascending, cut where a forward pass switches: as few ranges as `alike` (short, long) allows.

    A model with one switch (longrope) has two ranges. Past `MAX_SWITCHES` every length is a range of its own, as where
    rotary frequencies follow the length.
    """
    ranges: list[list[int]] = []
    while lengths:
        if len(ranges) > MAX_SWITCHES:
            return [*ranges, *([length] for length in lengths)]
        apart = len(lengths)
        if not alike(lengths[0], lengths[-1]):
            last_alike, apart = 0, len(lengths) - 1
            while apart - last_alike > 1:
                middle = (last_alike + apart) // 2
                if alike(lengths[0], lengths[middle]):
                    last_alike = middle
                else:
                    apart = middle
        ranges.append(lengths[: max(1, apart)])
        lengths = lengths[max(1, apart) :]
    return ranges


@contextlib.contextmanager
def _naming_the_longest(examples: Sequence[Example]) -> Iterator[None]:
    """Turn a lack of memory into a DataflexError: a few rows forward take less than a pass over the longest."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        longest = examples[int(np.argmax(lengths_of(examples)))]
        raise DataflexError(
            f"out of memory over {len(longest.input_ids)} tokens (row {longest.row} of {longest.dataset} is the "
            "longest); lower cutoff_len"
        ) from error


class _FirstRow:
    """What a forward pass over a batch says of its first row: the loss at each of its tokens, and the buffers."""

    def __init__(self, capture: Capture, rows: list[Example]) -> None:
        input_ids, _ = capture.inputs(rows)
        targets = input_ids[0, 1 : len(rows[0].input_ids)]
        position_losses = capture.position_losses
        with capture.running(), torch.no_grad():
            index = torch.arange(len(targets), device=capture.device)
            self.losses = position_losses(capture.model, input_ids, index, targets)
            self.state = ForwardState(capture.model)
        self.tolerance = LOSS_TOLERANCE[capture.dtype]

    def is_like(self, other: _FirstRow) -> bool:
        difference = (self.losses - other.losses).norm()
        return bool(difference <= self.tolerance * self.losses.norm()) and self.state.is_like(other.state)


def _mixes_tokens(capture: Capture, rows: list[Example]) -> bool:
    """True if a layer is given the tokens of several rows in an order of its own, as an expert of a mixture."""
    try:
        _first_gradient(capture, rows)
    except TokensMixed:
        return True
    return False


def _first_gradient(capture: Capture, rows: list[Example]) -> torch.Tensor:
    """The flat gradient [P] of the first of `rows`, taken from a batch of them all."""
    flat = torch.zeros(capture.parameters, device=capture.device)
    position_losses = capture.position_losses

    def keep(slot: Slot, gradient: torch.Tensor) -> None:
        flat[slot.offset : slot.offset + slot.size] = gradient[0]

    with capture.running():
        values = [(a.to(capture.device), b.to(capture.device)) for a, b in adapter_values(capture.pairs)]
        row_gradients(
            capture.model,
            capture.pairs,
            capture.slots,
            values,
            *capture.inputs(rows),
            keep,
            position_losses=position_losses,
            fused=capture.fused,
        )
    return flat


@contextlib.contextmanager
def _noting_calls(capture: Capture) -> Iterator[set[str]]:
    """The last names of the adapted modules that are called while the block runs."""
    called: set[str] = set()
    names = {pair.module: _last_name(pair.name) for pair in capture.pairs}
    hooks = [module.register_forward_hook(lambda module, *_: called.add(names[module])) for module in names]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _autograd_gradient(capture: Capture, row: Example) -> torch.Tensor:
    """One row's flat gradient [P] as training has it."""
    parameters = [slot.parameter for slot in capture.slots]
    with capture.running(), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss = row_losses(capture.model, *capture.inputs([row]), whole_losses).loss.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]
