"""Per-row gradients of the LoRA pairs from one batched backward pass.

For a pair y = Wx + s·B(Ax) with δ = ∂L/∂y, row i's gradients are ∂A = s·(δB)ᵀx and ∂B = s·δᵀ(xAᵀ),
sums over that row's tokens: two small batched products of what went into the layer and what came
back. The loss is the sum over rows of each row's token mean, so every row's gradient is the one a
batch of one gives. Nothing is accumulated in any `.grad`, and nothing below the first adapted layer
is differentiated.

Training's own code casts and keeps more than gradients need: a plain layer is therefore run as one function
here (`_AdaptedLinear`), with the same products in the same dtype. Merged weights, y = (W + s·BA)x, were tried
in its place: they save two small products and cost two sums of all weights a batch, and round in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dataflex import processes
from dataflex.cost import free_memory, shape_of, token_budget_for
from dataflex.data.batches import collate
from dataflex.data.examples import Example
from dataflex.errors import UsageError
from dataflex.gradients.loss import PositionLosses, RowLosses, position_losses_of, row_losses, whole_losses
from dataflex.lora import LoraPair, Slot, full_value, layout, lora_pairs
from dataflex.model import device

OnGradient = Callable[[Slot, torch.Tensor], None]
"""(slot, gradient [rows, slot.size] float32), called once for each slot during the backward pass."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block with dropout off and all parameters frozen, and leave `model` as it was found:
    modes, requires_grad, gradients and random-number states, also when the block raises."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


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
    fused: bool = True
    """Run adapted layers as one function each where that can be: faster, and the same numbers but for rounding."""

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

    @functools.cached_property
    def position_losses(self) -> PositionLosses:
        """How the loss is taken from the model's output head."""
        with undisturbed(self.model), self.autocast():
            return position_losses_of(self.model, self.device, may_run=not self.shared_weights)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def inputs(self, rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, [rows, T] on the device of the model."""
        batch = collate(rows, self.pad_token_id)
        return batch["input_ids"].to(self.device), batch["labels"].to(self.device)


def make_capture(model: nn.Module, dtype: torch.dtype, pad_token_id: int, token_budget: int | None) -> Capture:
    """Make `model`'s LoRA pairs ready for taking gradients.

    Without a `token_budget` the free memory of the first process's device gives one. Every process must call this.

    Raises:
        UsageError: for float16, which flushes gradients below 6e-8 to zero; training scales its loss against that.
    """
    if dtype == torch.float16:
        raise UsageError("fp16: gradients of single rows underflow in float16; use bf16=true, or neither")
    pairs = lora_pairs(model)
    slots = layout(pairs)
    return Capture(model, pairs, slots, dtype, pad_token_id, token_budget or _fitting_budget(model, slots, dtype))


def _fitting_budget(model: nn.Module, slots: list[Slot], dtype: torch.dtype) -> int:
    shape = shape_of(model.config, base=0, adapter=slots[-1].offset + slots[-1].size, itemsize=dtype.itemsize)
    return processes.broadcast(token_budget_for(shape, free_memory(device()), device().type))


def adapter_values(pairs: list[LoraPair]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs' A [r, in] and B [out, r] as float32; a model that stands still needs them once.

    Collective under ZeRO-3.
    """
    return [(full_value(pair.weight_a), full_value(pair.weight_b)) for pair in pairs]


def row_gradients(
    model: nn.Module,
    pairs: list[LoraPair],
    slots: list[Slot],
    values: list[tuple[torch.Tensor, torch.Tensor]],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    on_gradient: OnGradient,
    *,
    position_losses: PositionLosses = whole_losses,
    fused: bool = True,
) -> RowLosses:
    """Hand every row's gradient of every LoRA tensor to `on_gradient`, pair by pair, as backward meets them.

    Run it inside `undisturbed`. `slots` is `layout(pairs)`, `values` is `adapter_values(pairs)`; `fused` takes the
    layers that `can_fuse` as one function each, not as training runs them; the rest are the arguments of
    `row_losses`. A layer that took no part in the pass (an expert no token was sent to) has gradient zero.

    Raises:
        UsageError: if a layer is used twice in one pass, so that its gradients would arrive in parts, or is given
            tokens without their rows.
    """
    waiting = {slot.name: slot for slot in slots}

    def once(slot: Slot, gradient: torch.Tensor) -> None:
        if waiting.pop(slot.name, None) is None:
            raise UsageError(f"{slot.name} is used more than once in a forward pass; its rows cannot be told apart")
        on_gradient(slot, gradient)

    with contextlib.ExitStack() as watched:
        for index, pair in enumerate(pairs):
            watch = _Watch(pair, *values[index], slots[2 * index], slots[2 * index + 1], len(labels), once)
            watched.enter_context(_fused(watch) if fused and can_fuse(pair) else _hooked(watch))
        with torch.enable_grad():
            losses = row_losses(model, input_ids, labels, position_losses)
            losses.loss.sum().backward()
    for slot in waiting.values():
        on_gradient(slot, torch.zeros(len(labels), slot.size, device=labels.device))
    return RowLosses(losses.loss.detach(), losses.tokens)


def can_fuse(pair: LoraPair) -> bool:
    """True for a pair on a plain linear layer whose weight is here, not quantized and not shared out by ZeRO-3, and
    whose code nobody has changed or watches."""
    base = pair.module.get_base_layer()
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and not hasattr(base.weight, "ds_id")
        and not any("forward" in vars(module) for module in (pair.module, base))
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )


@dataclass(frozen=True)
class _Watch:
    """One pair of one pass."""

    pair: LoraPair
    weight_a: torch.Tensor
    """[r, in] float32"""
    weight_b: torch.Tensor
    """[out, r] float32"""
    slot_a: Slot
    slot_b: Slot
    rows: int
    on_gradient: OnGradient

    def gradients(self, x: torch.Tensor, x_a: torch.Tensor, delta: torch.Tensor, delta_b: torch.Tensor) -> None:
        """Hand on both tensors' gradients: from x [rows, T, in], xAᵀ [rows, T, r], δ [rows, T, out] and s·δB
        [rows, T, r]."""
        if x.dim() != 3 or len(x) != self.rows:
            raise UsageError(
                f"{self.pair.name} is given tokens of all rows at once, {list(x.shape)}, not row by row, so their "
                "gradients cannot be told apart; take it out of lora_target"
            )
        gradient_a = torch.bmm(delta_b.transpose(1, 2), x).float()  # [rows, r, in]
        self.on_gradient(self.slot_a, gradient_a.flatten(1))
        gradient_b = torch.bmm(delta.transpose(1, 2), x_a).float()  # [rows, out, r]
        self.on_gradient(self.slot_b, gradient_b.mul_(self.pair.scaling).flatten(1))


@contextlib.contextmanager
def _hooked(watch: _Watch) -> Iterator[None]:
    """The layer as training runs it; a hook waits for the gradient of its output."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_()  # the first adapted layers: the graph starts here, not below

        def on_backward(delta: torch.Tensor) -> None:
            with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                inputs, change = x.float(), delta.float()
                delta_b = change @ (watch.weight_b * watch.pair.scaling)
                watch.gradients(inputs, inputs @ watch.weight_a.T, change, delta_b)

        output.register_hook(on_backward)

    handle = watch.pair.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _fused(watch: _Watch) -> Iterator[None]:
    """The layer's own arithmetic as one function of its input, which shares what both directions need."""
    module = watch.pair.module
    start = torch.empty(0, requires_grad=True)  # the first adapted layers: the graph starts here, not below
    module.forward = lambda x, *args, **kwargs: _AdaptedLinear.apply(x, start, watch)
    try:
        yield
    finally:
        del module.forward


class _AdaptedLinear(torch.autograd.Function):
    """y = Wx + bias + s·B(Ax) in W's dtype, whose backward pass hands the pair's gradients to its watch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, start: torch.Tensor, watch: _Watch) -> torch.Tensor:
        base = watch.pair.module.get_base_layer()
        dtype = base.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(dtype)
            x_a = inputs @ watch.weight_a.T.to(dtype)
            y = functional.linear(inputs, base.weight, base.bias)
            _add_product(y, x_a, (watch.weight_b.T * watch.pair.scaling).to(dtype))
        ctx.watch, ctx.dtype = watch, x.dtype
        ctx.save_for_backward(inputs, x_a)
        return y

    @staticmethod
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        watch, (x, x_a) = ctx.watch, ctx.saved_tensors
        weight = watch.pair.module.get_base_layer().weight
        with torch.autocast(x.device.type, enabled=False):
            delta_b = delta @ (watch.weight_b * watch.pair.scaling).to(weight.dtype)
            watch.gradients(x, x_a, delta, delta_b)
            if not ctx.needs_input_grad[0]:
                return None, None, None
            below = delta @ weight
            _add_product(below, delta_b, watch.weight_a.to(weight.dtype))
        return below.to(ctx.dtype), None, None


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out [..., n] += left [..., r] @ right [r, n], without a temporary."""
    out.view(-1, out.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right)
