"""What a forward pass leaves behind in a model, and a model left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dataflex.config import needed


class ForwardState:
    """What a forward pass may leave behind in a model: buffers, and plain values of the modules that hold them.

    A rotary embedding whose frequencies follow the longest row seen so far keeps them in a buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = [
            (module, {name: _Buffer(tensor) for name, tensor in buffers.items()}, _plain_values(module))
            for module in model.modules()
            if (buffers := {name: tensor for name, tensor in module._buffers.items() if tensor is not None})
        ]

    def restore(self) -> None:
        """Put back what has changed since; where the model has moved to another device or dtype, there."""
        for module, buffers, values in self.parts:
            vars(module).update(values)
            for name, buffer in buffers.items():
                module._buffers[name] = buffer.restored(needed(module._buffers[name]))

    def is_like(self, other: ForwardState) -> bool:
        """Whether both have the same in their buffers; buffers that grew, as a table of masks, are not compared."""
        return all(
            torch.equal(mine[name].copy, theirs[name].copy)
            for (_, mine, _), (_, theirs, _) in zip(self.parts, other.parts, strict=True)
            for name in mine.keys() & theirs.keys()
            if mine[name].is_copied and mine[name].copy.shape == theirs[name].copy.shape
        )


class _Buffer:
    """A buffer and, unless it is large as a quantized weight is, a copy of its contents."""

    MAX_COPIED = 1 << 20

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version
        self.is_copied = tensor.numel() <= self.MAX_COPIED
        self.copy = tensor.clone() if self.is_copied else tensor

    def restored(self, now: torch.Tensor) -> torch.Tensor:
        if (now.device, now.dtype) != (self.tensor.device, self.tensor.dtype):
            return self.copy.to(now) if self.is_copied else now
        if self.is_copied and self.tensor._version != self.version:
            self.tensor.copy_(self.copy)
            self.version = self.tensor._version
        return self.tensor


def _plain_values(module: nn.Module) -> dict[str, Any]:
    kept = (bool, int, float, str, torch.Tensor, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, kept)
    }


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block with dropout off and all parameters frozen, and leave `model` as it was found: modes,
    requires_grad, gradients, buffers and random-number states, also when the block raises."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    state = ForwardState(model)
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
        state.restore()
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
