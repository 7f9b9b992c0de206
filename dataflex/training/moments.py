"""Adam's moments by parameter name: taken from a live optimizer, written beside a checkpoint, read back.

An optimizer's own state is keyed by integers and pickled; names survive a change of parameter order,
and safetensors holds no code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dataflex.errors import UsageError
from dataflex.lora import Slot

FILE_NAME = "moments.safetensors"


@dataclass(frozen=True)
class AdamMoments:
    """AdamW's state after `step` optimizer steps. Tensors are float32, shaped like their parameter."""

    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    step: int
    learning_rate: float
    """Of the latest step."""
    beta1: float
    beta2: float
    eps: float


def live_moments(optimizer: torch.optim.Optimizer, slots: list[Slot], step: int, learning_rate: float) -> AdamMoments:
    """Copies of the moments `optimizer` holds for each slot; zeros before its first step.

    Where DeepSpeed has shared the state out, it is gathered: every process must call this, and gets all of it.
    """
    group = optimizer.param_groups[0]
    exp_avg, exp_avg_sq = {}, {}
    for slot in slots:
        for key, target in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            target[slot.name] = _state_of(optimizer, slot, key, step)
    beta1, beta2 = group["betas"]
    return AdamMoments(exp_avg, exp_avg_sq, step, learning_rate, float(beta1), float(beta2), float(group["eps"]))


def _state_of(optimizer: torch.optim.Optimizer, slot: Slot, key: str, step: int) -> torch.Tensor:
    parameter = slot.parameter
    if step == 0:  # no optimizer has made its state yet
        held = None
    elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # ZeRO 3; ZeRO 1, 2 and bf16
        from deepspeed.utils import safe_get_full_optimizer_state

        held = safe_get_full_optimizer_state(parameter, key)
    else:
        held = optimizer.state.get(parameter, {}).get(key)
    if held is None:  # a parameter that no row has reached
        held = torch.zeros(slot.size)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return held.detach().to(torch.float32, copy=True).view(shape)


def moments_fingerprint(moments: AdamMoments) -> str:
    """sha256 (hex) over both moments of every parameter and the numbers beside them."""
    digest = hashlib.sha256()
    for kind in (moments.exp_avg, moments.exp_avg_sq):
        for name, value in kind.items():
            digest.update(name.encode())
            digest.update(value.detach().float().contiguous().cpu().numpy().data)
    digest.update(repr((moments.step, moments.beta1, moments.beta2, moments.eps)).encode())
    return digest.hexdigest()


def save_moments(moments: AdamMoments, folder: Path) -> None:
    """Write `moments` into a checkpoint folder; atomic."""
    from safetensors.torch import save

    from dataflex.files import atomic

    tensors = {f"exp_avg/{name}": value.contiguous().cpu() for name, value in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq/{name}": value.contiguous().cpu() for name, value in moments.exp_avg_sq.items()}
    numbers = {key: repr(getattr(moments, key)) for key in ("step", "learning_rate", "beta1", "beta2", "eps")}
    with atomic(folder / FILE_NAME, "wb") as handle:
        handle.write(save(tensors, metadata=numbers))


def load_moments(folder: Path) -> AdamMoments | None:
    """The moments in a checkpoint folder, or None where it has none.

    Raises:
        UsageError: if the file is broken.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE_NAME
    if not path.is_file():
        return None
    exp_avg: dict[str, torch.Tensor] = {}
    exp_avg_sq: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            numbers = tensors.metadata() or {}
            for key in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                kind, _, name = key.partition("/")
                {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}[kind][name] = tensors.get_tensor(key)
        return AdamMoments(
            exp_avg,
            exp_avg_sq,
            step=int(numbers["step"]),
            **{key: float(numbers[key]) for key in ("learning_rate", "beta1", "beta2", "eps")},
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"checkpoint {folder}: {FILE_NAME} is broken ({error}); write the checkpoint again") from None
