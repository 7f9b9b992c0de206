"""Γ: from a row's gradient to the direction it is scored by. Elementwise, float32, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dataflex.errors import UsageError
from dataflex.lora import Slot
from dataflex.training.moments import AdamMoments

Direction = Callable[[Slot, torch.Tensor], torch.Tensor]
"""(slot, gradient [rows, size] float32) → direction, same shape; may overwrite the gradient."""


def plain_direction(slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient itself: the direction `sgd`."""
    return gradient


def adam_direction(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    formula: str = "torch",
) -> torch.Tensor:
    """The step AdamW would take on `gradient` alone, divided by −lr, at weight decay 0.

    With m' = β1·m + (1−β1)·g, v' = β2·v + (1−β2)·g² and t = step + 1:

    - ``torch``: (m'/(1−β1^t)) / (√(v'/(1−β2^t)) + ε), what `torch.optim.AdamW.step` does;
    - ``dataflex``: m' / (√v' + ε), as DataFlex 1.1 has it;
    - ``less``: m' / √(v' + ε), as LESS's published code has it (arXiv 2402.04333).

    Args:
        gradient: [rows, size] float32.
        exp_avg, exp_avg_sq: [size], the moments after AdamW has taken `step` steps at this parameter.
    """
    time = step + 1
    correction1, correction2 = (1 - beta1**time, 1 - beta2**time) if formula == "torch" else (1.0, 1.0)
    # the [size] parts are scaled first: five passes over [rows, size] are then enough
    numerator = torch.add(exp_avg * (beta1 / correction1), gradient, alpha=(1 - beta1) / correction1)
    second = exp_avg_sq * (beta2 / correction2)
    variance = torch.addcmul(second, gradient, gradient, value=(1 - beta2) / correction2)
    if formula in ("torch", "dataflex"):
        denominator = variance.sqrt_().add_(eps)
    elif formula == "less":
        denominator = variance.add_(eps).sqrt_()
    else:
        raise ValueError(f"adam_formula {formula!r}; expected torch, dataflex or less")
    return numerator.div_(denominator)


def make_direction(
    gradient_type: str, formula: str, moments: AdamMoments | None, slots: list[Slot], marginal: bool = False
) -> Direction:
    """The Γ of a pass, its moments checked against the parameters it will meet.

    Args:
        marginal: give Γ(g) − Γ(0), which leaves out the step that AdamW would take on a zero gradient: the momentum,
            which every row's Γ shares. The directions sgd and sign of a zero gradient are zero already.

    Raises:
        UsageError: for `adam` without moments, or with moments of other parameters.
    """
    if gradient_type == "sgd":
        return plain_direction
    if gradient_type == "sign":
        return lambda slot, gradient: gradient.sign_()
    if moments is None:
        raise UsageError(
            "gradient_type adam needs Adam moments, and the checkpoint has no moments.safetensors; "
            "use a checkpoint that warmup, train or dynamic wrote, or gradient_type=sgd"
        )
    for slot in slots:
        for held in (moments.exp_avg.get(slot.name), moments.exp_avg_sq.get(slot.name)):
            if held is None or held.numel() != slot.size:
                raise UsageError(
                    f"the checkpoint's moments.safetensors does not fit its adapter at {slot.name}; write the "
                    "checkpoint again"
                )
    device = slots[0].parameter.device
    first = {slot.name: moments.exp_avg[slot.name].reshape(-1).to(device) for slot in slots}
    second = {slot.name: moments.exp_avg_sq[slot.name].reshape(-1).to(device) for slot in slots}

    def adam(slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
        return adam_direction(
            gradient,
            first[slot.name],
            second[slot.name],
            moments.steps[slot.name],
            moments.beta1,
            moments.beta2,
            moments.eps,
            formula,
        )

    if not marginal:
        return adam
    at_zero = {slot.name: adam(slot, torch.zeros(1, slot.size, device=device)) for slot in slots}
    return lambda slot, gradient: adam(slot, gradient).sub_(at_zero[slot.name])
