"""Per-row gradients of the LoRA pairs from one batched backward pass.

For a pair y = Wx + s·B(Ax) with δ = ∂L/∂y, row i's gradients are ∂A = s·(δB)ᵀx and ∂B = s·δᵀ(xAᵀ),
sums over that row's tokens: two small batched products of what a hook saw going in and what came
back. The loss is the sum over rows of each row's token mean, so every row's gradient is the one a
batch of one gives. Nothing is accumulated in any `.grad`, and nothing below the first adapted layer
is differentiated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dataflex.errors import UsageError
from dataflex.lora import LoraPair, Slot, full_value

OnGradient = Callable[[Slot, torch.Tensor], None]
"""(slot, gradient [rows, slot.size] float32), called once for each slot during the backward pass."""


@dataclass(frozen=True)
class RowLosses:
    """What the forward pass says of each row of a batch."""

    loss: torch.Tensor
    """[rows] float32: mean cross-entropy over the row's supervised tokens."""
    tokens: torch.Tensor
    """[rows] int64: supervised tokens."""


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


def row_losses(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> RowLosses:
    """Mean cross-entropy of each row, with logits computed at supervised positions only.

    Args:
        model: a causal language model (PEFT-wrapped or not).
        input_ids, labels: [rows, T], padded on the right; −100 where unsupervised. Attention is
            causal, so right padding needs no mask: no real token ever looks at it.
    """
    targets = labels[:, 1:]
    supervised = functional.pad(targets != -100, (0, 1))
    head = model.get_output_embeddings()

    def keep_supervised(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][supervised][None],)

    handle = head.register_forward_pre_hook(keep_supervised)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    losses = functional.cross_entropy(logits.float(), targets[supervised[:, :-1]], reduction="none")
    tokens = supervised.sum(dim=1)
    rows = supervised.nonzero()[:, 0]
    total = torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)
    return RowLosses(total / tokens, tokens)


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
) -> RowLosses:
    """Hand every row's gradient of every LoRA tensor to `on_gradient`, pair by pair, as backward meets them.

    Run it inside `undisturbed`. `slots` is `layout(pairs)`, `values` is `adapter_values(pairs)`; the rest are
    the arguments of `row_losses`. A layer that took no part in the pass (an expert no token was sent to) has
    gradient zero.

    Raises:
        UsageError: if a layer is used twice in one pass; its gradients would arrive in parts.
    """
    waiting = {slot.name: slot for slot in slots}

    def once(slot: Slot, gradient: torch.Tensor) -> None:
        if waiting.pop(slot.name, None) is None:
            raise UsageError(f"{slot.name} is used more than once in a forward pass; its rows cannot be told apart")
        on_gradient(slot, gradient)

    handles = [
        pair.module.register_forward_hook(_watch(pair, values[index], slots[2 * index], slots[2 * index + 1], once))
        for index, pair in enumerate(pairs)
    ]
    try:
        with torch.enable_grad():
            losses = row_losses(model, input_ids, labels)
            losses.loss.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    for slot in waiting.values():
        on_gradient(slot, torch.zeros(len(labels), slot.size, device=labels.device))
    return RowLosses(losses.loss.detach(), losses.tokens)


def _watch(
    pair: LoraPair, values: tuple[torch.Tensor, torch.Tensor], slot_a: Slot, slot_b: Slot, on_gradient: OnGradient
) -> Callable[..., None]:
    """A forward hook that waits for the gradient of the layer's output."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_()  # the first adapted layers: the graph starts here, not below

        def on_backward(delta: torch.Tensor) -> None:
            with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                inputs = x.float()  # [rows, T, in]
                delta = delta.float() * pair.scaling  # [rows, T, out]
                weight_a, weight_b = values
                gradient_a = torch.bmm((delta @ weight_b).transpose(1, 2), inputs)  # [rows, r, in]
                on_gradient(slot_a, gradient_a.flatten(1))
                gradient_b = torch.bmm(delta.transpose(1, 2), inputs @ weight_a.T)  # [rows, out, r]
                on_gradient(slot_b, gradient_b.flatten(1))

        output.register_hook(on_backward)

    return hook
