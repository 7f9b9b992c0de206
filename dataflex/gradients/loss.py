"""Each row's loss, with logits at supervised positions only and never all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Tokens whose logits are held at a time: with fewer the head's weight, read anew for each chunk, costs more than the
# products; more only take memory, which the second line bounds: about 1 GB for logits, their exponentials and the rest.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
CHUNK_NUMBERS = 1 << 27


@dataclass(frozen=True)
class RowLosses:
    """What the forward pass says of each row of a batch."""

    loss: torch.Tensor
    """[rows] float32: mean cross-entropy over the row's supervised tokens."""
    tokens: torch.Tensor
    """[rows] int64: supervised tokens."""


def row_losses(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, plain_head: bool = False) -> RowLosses:
    """Mean cross-entropy of each row.

    Args:
        model: a causal language model (PEFT-wrapped or not).
        input_ids, labels: [rows, T], padded on the right; −100 where unsupervised. Attention is
            causal, so right padding needs no mask: no real token ever looks at it.
        plain_head: what `has_plain_head` says of the model; the logits are then made and used in chunks.
    """
    rows, length = labels.shape
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    places = (targets != -100).nonzero()[:, 0]  # here a GPU is waited for: better before the forward pass than after
    wanted = targets[places]
    head = model.get_output_embeddings()
    if plain_head:
        with _head_input(head, lambda hidden: hidden[:1, :1]) as seen:
            model(input_ids=input_ids, use_cache=False)
        hidden = seen[0].flatten(0, 1).index_select(0, places)
        losses = _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, wanted)
    elif type(head) is nn.Linear:
        with _head_input(head, lambda hidden: hidden.flatten(0, 1).index_select(0, places)[None]):
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
        losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
    else:  # an adapter on the head must see which token is whose
        logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1).index_select(0, places)
        losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
    by_row = losses.new_zeros(rows * length).index_copy(0, places, losses).view(rows, length)
    tokens = (targets != -100).view(rows, length).sum(dim=1)
    return RowLosses(by_row.sum(dim=1) / tokens, tokens)


def has_plain_head(model: nn.Module, device: torch.device) -> bool:
    """True where the logits are the output head's weight times its input and nothing more: no adapter, no
    quantization, no scale or cap after it. Found out by a forward pass over tokens from all over the vocabulary (the
    padding token alone, whose hidden state may be zero, would show nothing)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    some_tokens = torch.linspace(0, len(head.weight) - 1, 8, device=device).long()[None]
    with torch.no_grad(), _head_input(head, lambda hidden: hidden) as seen:
        logits = model(input_ids=some_tokens, use_cache=False).logits
        return torch.equal(logits, functional.linear(seen[0], head.weight, head.bias))


@contextlib.contextmanager
def _head_input(head: nn.Module, keep: Any) -> Iterator[list[torch.Tensor]]:
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
        length = min(CHUNK_TOKENS[hidden.device.type], max(1, CHUNK_NUMBERS // len(weight)))
        for start in range(0, len(hidden), length):
            part = slice(start, start + length)
            logits = functional.linear(hidden[part], weight, bias).float()
            picked = targets[part, None]
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, picked))[:, 0]
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, picked, torch.full_like(normaliser, -1))
                gradient[part] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None
