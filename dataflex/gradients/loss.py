"""Each row's loss, with logits at supervised positions only and never all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Supervised positions whose logits are held at a time. With fewer, reading the head's weight for each chunk costs more
# than the products do. More only takes memory, which MAX_FLOATS bounds: about 1 GB for logits and their exponentials.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
MAX_FLOATS = 1 << 27


@dataclass(frozen=True)
class RowLosses:
    """What the forward pass says of each row of a batch."""

    loss: torch.Tensor
    """[rows] float32: mean cross-entropy over the row's supervised tokens."""
    tokens: torch.Tensor
    """[rows] int64: supervised tokens."""


PositionLosses = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(model, input_ids [rows, T], index [n], targets [n]) → cross-entropy [n] float32 at positions `index` of rows·T."""


def row_losses(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, position_losses: PositionLosses
) -> RowLosses:
    """Mean cross-entropy of each row.

    Args:
        model: a causal language model (PEFT-wrapped or not).
        input_ids, labels: [rows, T], padded on the right; −100 where unsupervised. Attention is
            causal, so right padding needs no mask: no real token ever looks at it.
        position_losses: what `position_losses_of` says of the model.
    """
    rows, length = labels.shape
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # [rows·T]
    index = (targets != -100).nonzero()[:, 0]  # here a GPU is waited for: better before the forward pass than after
    losses = position_losses(model, input_ids, index, targets[index])
    by_row = losses.new_zeros(rows * length).index_copy(0, index, losses).view(rows, length)
    tokens = (targets != -100).view(rows, length).sum(dim=1)
    return RowLosses(by_row.sum(dim=1) / tokens, tokens)


def chunked_losses(
    model: nn.Module, input_ids: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """For a plain head: the model runs up to it, hidden [n, H] is taken at `index`, and the logits [chunk, V] are made
    and used a chunk at a time."""
    head = model.get_output_embeddings()
    with _head_input(head, lambda hidden: hidden[:1, :1]) as seen:
        model(input_ids=input_ids, use_cache=False)
    hidden = seen[0].flatten(0, 1).index_select(0, index)
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call] # torch leaves Function.apply untyped
        hidden, head.weight, head.bias, targets
    )


def supervised_losses(
    model: nn.Module, input_ids: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """For a linear head with a scale or cap after it: the head is given hidden [1, n, H] at `index` alone, and the
    model makes logits [1, n, V] of it."""
    head = model.get_output_embeddings()
    with _head_input(head, lambda hidden: hidden.flatten(0, 1).index_select(0, index)[None]):
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def whole_losses(model: nn.Module, input_ids: torch.Tensor, index: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """For any head: logits [rows, T, V] of every position, of which those at `index` are used. An adapter on the head
    needs it, as it must see which token is whose."""
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1).index_select(0, index)
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def hidden_states(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What the output head is given, [rows, T, H]: the last layer's hidden states, after the final norm. The head runs
    on one position alone."""
    with _head_input(model.get_output_embeddings(), lambda hidden: hidden[:1, :1]) as seen:
        model(input_ids=input_ids, use_cache=False)
    return seen[0]


def position_losses_of(model: nn.Module, device: torch.device, may_run: bool = True) -> PositionLosses:
    """The path that needs the least memory among those that fit the model's output head.

    A head is plain where the logits are its weight times its input and nothing more: no adapter, no quantization, no
    scale or cap after it. A forward pass finds out, over tokens from all over the vocabulary (the padding token alone,
    whose hidden state may be zero, would show nothing).

    Args:
        may_run: False where the model cannot run a forward pass now; its head then counts as not plain.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return whole_losses
    if not may_run:
        return supervised_losses
    tokens = torch.linspace(0, len(head.weight) - 1, 8, device=device).long()[None]
    with torch.no_grad(), _head_input(head, lambda hidden: hidden) as seen:
        logits = model(input_ids=tokens, use_cache=False).logits
        plain = torch.equal(logits, functional.linear(seen[0], head.weight, head.bias))
    return chunked_losses if plain else supervised_losses


@contextlib.contextmanager
def _head_input(head: nn.Module, keep: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """While the block runs, collect what `head` is given, and give it only what `keep` leaves of that."""
    seen: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(args[0])
        return (keep(args[0]),)

    handle = head.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each position [n] float32 from hidden states [n, H], the head's weight [V, H], its bias and
    the target tokens [n].

    A position's loss depends on its own hidden state alone, so the gradient is made where the logits are, in the
    forward pass, and only has to be scaled in the backward one.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        length = min(CHUNK_TOKENS[hidden.device.type], max(1, MAX_FLOATS // len(weight)))
        for start in range(0, len(hidden), length):
            part = slice(start, start + length)
            logits = functional.linear(hidden[part], weight, bias).float()
            target = targets[part, None]
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, target))[:, 0]
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, target, torch.full_like(normaliser, -1))
                gradient[part] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None
