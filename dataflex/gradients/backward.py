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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dataflex.errors import UsageError
from dataflex.gradients.loss import PositionLosses, RowLosses, row_losses, whole_losses
from dataflex.lora import LoraPair, Slot, full_value

OnGradient = Callable[[Slot, torch.Tensor], None]
"""(slot, gradient [rows, slot.size] float32), called once for each slot during the backward pass."""


class TokensMixed(UsageError):
    """A layer is given the tokens of all rows in an order of its own, so that its rows cannot be told apart."""


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
    `row_losses`. A layer that took no part in the pass (an expert no token was sent to) has gradient zero. A layer
    that is used more than once has the sum.

    Raises:
        TokensMixed: if a layer is given tokens without their rows.
    """
    rows, length = labels.shape
    watches = [
        _Watch(pair, *values[index], slots[2 * index], slots[2 * index + 1], rows, length, on_gradient)
        for index, pair in enumerate(pairs)
    ]
    with contextlib.ExitStack() as watched:
        for watch in watches:
            watched.enter_context(_fused(watch) if fused and can_fuse(watch.pair) else _hooked(watch))
        with torch.enable_grad():
            losses = row_losses(model, input_ids, labels, position_losses)
            losses.loss.sum().backward()
    for watch in watches:
        watch.finish(labels.device)
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


@dataclass
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
    length: int
    """T, the tokens of a padded row."""
    on_gradient: OnGradient
    uses: int = 0
    """How often the forward pass ran the layer, and the backward pass has not come back to it."""
    sums: tuple[torch.Tensor, torch.Tensor] | None = None
    """What has come back so far of a layer that is used more than once: [rows, r·in] and [rows, out·r] float32."""
    done: bool = False

    def gradients(self, x: torch.Tensor, x_a: torch.Tensor, delta: torch.Tensor, delta_b: torch.Tensor) -> None:
        """Take one use's share of both tensors' gradients: from x [rows, T, in], xAᵀ [rows, T, r], δ [rows, T, out]
        and s·δB [rows, T, r]. The last use hands the sums on."""
        x, x_a, delta, delta_b = map(self._by_row, (x, x_a, delta, delta_b))
        self.uses -= 1
        if self.uses == 0 and self.sums is None:  # one at a time, so that only one need be held
            self.done = True
            self.on_gradient(self.slot_a, _summed_products(delta_b, x))
            self.on_gradient(self.slot_b, _summed_products(delta, x_a).mul_(self.pair.scaling))
            return
        shares = _summed_products(delta_b, x), _summed_products(delta, x_a).mul_(self.pair.scaling)
        self.sums = shares if self.sums is None else (self.sums[0] + shares[0], self.sums[1] + shares[1])
        if self.uses == 0:
            self.finish(x.device)

    def finish(self, device: torch.device) -> None:
        """Hand on what has come back, zero where nothing has, unless it is handed on already."""
        if self.done:
            return
        self.done = True
        slots = (self.slot_a, self.slot_b)
        for slot, gradient in zip(slots, self.sums or (None, None), strict=True):
            self.on_gradient(slot, torch.zeros(self.rows, slot.size, device=device) if gradient is None else gradient)
        self.sums = None

    def _by_row(self, tokens: torch.Tensor) -> torch.Tensor:
        """What a layer is given or gives, as [rows, tokens, features]."""
        if tokens.dim() >= 3 and len(tokens) == self.rows:
            return tokens.flatten(1, -2)
        if self.rows == 1:
            return tokens.reshape(1, -1, tokens.shape[-1])
        if tokens.dim() == 2 and len(tokens) == self.rows * self.length:
            return tokens.unflatten(0, (self.rows, self.length))
        raise TokensMixed(
            f"{self.pair.name} is given tokens of all rows at once, {list(tokens.shape)}, not row by row, so their "
            "gradients cannot be told apart; take it out of lora_target"
        )


def _summed_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[rows, T, m] and [rows, T, n] → [rows, m·n] float32, each row's sum over T of the outer products."""
    return torch.bmm(left.transpose(1, 2), right).float().flatten(1)


@contextlib.contextmanager
def _hooked(watch: _Watch) -> Iterator[None]:
    """The layer as training runs it; a hook waits for the gradient of its output."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].detach()
        watch.uses += 1
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
    run: Any = _AdaptedLinear.apply
    module.forward = lambda x, *args, **kwargs: run(x, start, watch)
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
        watch.uses += 1
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
