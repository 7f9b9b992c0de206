"""A model whose rows' gradients are taken: what the passes need of it, and how many tokens a batch may have."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dataflex import processes
from dataflex.cost import free_memory, shape_of, token_budget_for
from dataflex.data.batches import collate
from dataflex.data.examples import Example
from dataflex.errors import UsageError
from dataflex.gradients.forward_state import ForwardState, undisturbed
from dataflex.gradients.loss import PositionLosses, position_losses_of
from dataflex.lora import LoraPair, Slot, layout, lora_pairs, pairs_of_layers
from dataflex.model import device


@dataclass(frozen=True)
class Capture:
    """A model made ready for taking gradients from it: fixed for a whole pass."""

    model: nn.Module
    pairs: list[LoraPair]
    slots: list[Slot]
    dtype: torch.dtype
    """Of the matrix products; below float32 they run under autocast, as in training."""
    pad_token_id: int
    token_budget: int
    state: ForwardState
    """As the model was loaded: every batch starts from it, whatever ran before."""
    fused: bool = True
    """Run adapted layers as one function each where that can be: faster, and the same numbers but for rounding."""

    @property
    def parameters(self) -> int:
        """P, the length of the flat parameter vector."""
        return self.slots[-1].offset + self.slots[-1].size

    @property
    def device(self) -> torch.device:
        # ZeRO-3 may keep parameters elsewhere than where they are computed with
        return device() if self.shared_weights else next(self.model.parameters()).device

    @property
    def shared_weights(self) -> bool:
        """True under ZeRO-3, where every forward pass takes every process."""
        return hasattr(next(self.model.parameters()), "ds_id")

    @functools.cached_property
    def position_losses(self) -> PositionLosses:
        """How the loss is taken from the model's output head."""
        with self.running():
            return position_losses_of(self.model, self.device, may_run=not self.shared_weights)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run a block over one batch: in the state the model was loaded in, and leaving it as it was found."""
        with undisturbed(self.model), self.autocast():
            self.state.restore()
            yield

    def inputs(self, rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, [rows, T] on the device of the model."""
        batch = collate(rows, self.pad_token_id)
        return batch["input_ids"].to(self.device), batch["labels"].to(self.device)


def make_capture(
    model: nn.Module, dtype: torch.dtype, pad_token_id: int, token_budget: int | None, layers: str | None = None
) -> Capture:
    """Make `model`'s LoRA pairs ready for taking gradients: all of them, or those of the `layers` (`15-29`).

    Backward stops at the lowest layer that has one of these pairs.

    Without a `token_budget` the free memory of the first process's device gives one. Every process must call this.

    Raises:
        UsageError: for float16, which flushes gradients below 6e-8 to zero; training scales its loss against that.
    """
    if dtype == torch.float16:
        raise UsageError("fp16: gradients of single rows underflow in float16; use bf16=true, or neither")
    _check_padding(model, pad_token_id)
    pairs = lora_pairs(model)
    if layers is not None:
        pairs = pairs_of_layers(pairs, layers)
    slots = layout(pairs)
    budget = token_budget or _fitting_budget(model, slots[-1].offset + slots[-1].size, dtype)
    return Capture(model, pairs, slots, dtype, pad_token_id, budget, ForwardState(model))


def make_reader(model: nn.Module, dtype: torch.dtype, pad_token_id: int, token_budget: int | None) -> Capture:
    """Make `model`, with an adapter or without, ready for forward passes alone. Every process must call this."""
    _check_padding(model, pad_token_id)
    budget = token_budget or _fitting_budget(model, 0, dtype)
    return Capture(model, [], [], dtype, pad_token_id, budget, ForwardState(model))


def _check_padding(model: nn.Module, pad_token_id: int) -> None:
    embeddings = model.get_input_embeddings().num_embeddings
    if pad_token_id >= embeddings:
        raise UsageError(
            f"the tokenizer's pad token has the number {pad_token_id} and the model has {embeddings} embeddings; set "
            "pad_token in tokenizer_config.json to a token that the model knows"
        )


def _fitting_budget(model: nn.Module, adapter: int, dtype: torch.dtype) -> int:
    shape = shape_of(model.config, base=0, adapter=adapter, itemsize=dtype.itemsize)
    return processes.broadcast(token_budget_for(shape, free_memory(device()), device().type))
