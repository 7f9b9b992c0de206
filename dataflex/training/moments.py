"""Adam's moments by parameter name: taken from a live optimizer, written beside a checkpoint, read back.

An optimizer's own state is keyed by integers and pickled; names survive a change of parameter order,
and safetensors holds no code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.errors import UsageError, reason_of

if TYPE_CHECKING:
    import torch

    from dataflex.lora import Slot

FILE_NAME = "moments.safetensors"


@dataclass(frozen=True)
class AdamMoments:
    """AdamW's state by parameter name. Tensors are float32, shaped like their parameter."""

    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    steps: dict[str, int]
    """Steps that AdamW has taken at each parameter. A step without a gradient, or one that loss scaling skips, is not
    among them."""
    step: int
    """Steps of the run."""
    learning_rate: float
    """Of the latest step."""
    beta1: float
    beta2: float
    eps: float

    @property
    def own_steps(self) -> dict[str, int]:
        """The parameters at which AdamW has taken another number of steps than the run has."""
        return {name: own for name, own in self.steps.items() if own != self.step}


def live_moments(optimizer: torch.optim.Optimizer, slots: list[Slot], step: int, learning_rate: float) -> AdamMoments:
    """Copies of the moments `optimizer` holds for each slot; zeros before its first step.

    Where DeepSpeed has shared the state out, it is gathered: every process must call this, and gets all of it.
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    return AdamMoments(
        exp_avg={slot.name: _state_of(optimizer, slot, "exp_avg", step) for slot in slots},
        exp_avg_sq={slot.name: _state_of(optimizer, slot, "exp_avg_sq", step) for slot in slots},
        steps={slot.name: _steps_of(optimizer, slot) for slot in slots},
        step=step,
        learning_rate=learning_rate,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
    )


def _is_shared_out(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed holds the parameter's state in flat tensors: under ZeRO 3; under ZeRO 1, 2 and in bf16."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _steps_of(optimizer: torch.optim.Optimizer, slot: Slot) -> int:
    """The steps that AdamW has taken at a parameter."""
    if not _is_shared_out(slot.parameter):
        return int(optimizer.state.get(slot.parameter, {}).get("step", 0))
    # DeepSpeed fills missing gradients with zeros, so that all its flat tensors take every step
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def _state_of(optimizer: torch.optim.Optimizer, slot: Slot, key: str, step: int) -> torch.Tensor:
    import torch

    parameter = slot.parameter
    if step == 0:  # no optimizer has made its state yet
        held = None
    elif _is_shared_out(parameter):
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
    own_steps = sorted(moments.own_steps.items())
    digest.update(repr((moments.step, own_steps, moments.beta1, moments.beta2, moments.eps)).encode())
    return digest.hexdigest()


def save_moments(moments: AdamMoments, folder: Path) -> None:
    """Write `moments` into a checkpoint folder; atomic."""
    from safetensors.torch import save

    from dataflex.files import atomic

    tensors = {f"exp_avg/{name}": value.contiguous().cpu() for name, value in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq/{name}": value.contiguous().cpu() for name, value in moments.exp_avg_sq.items()}
    metadata = {key: repr(getattr(moments, key)) for key in ("step", "learning_rate", "beta1", "beta2", "eps")}
    if moments.own_steps:
        metadata["steps"] = json.dumps(moments.own_steps)
    with atomic(folder / FILE_NAME, "wb") as handle:
        handle.write(save(tensors, metadata=metadata))


def _numbers_of(metadata: Mapping[str, str]) -> dict[str, float]:
    """AdamW's numbers as a checkpoint tells them. Raises a ValueError for a number that AdamW does not take."""
    numbers = {key: float(metadata[key]) for key in ("learning_rate", "beta1", "beta2", "eps")}
    for key, value in numbers.items():
        if not (0 <= value < (1 if key.startswith("beta") else math.inf)):
            raise ValueError(f"{key} is {metadata[key]}")
    return numbers


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
            metadata = tensors.metadata() or {}
            for key in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                kind, _, name = key.partition("/")
                value = tensors.get_tensor(key)
                if not value.isfinite().all() or (kind == "exp_avg_sq" and (value < 0).any()):
                    raise ValueError(f"{key} holds numbers that no AdamW makes")
                {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}[kind][name] = value
        step = int(metadata["step"])
        own_steps = {name: int(own) for name, own in json.loads(metadata.get("steps", "{}")).items()}
        return AdamMoments(
            exp_avg,
            exp_avg_sq,
            steps=dict.fromkeys(exp_avg, step) | own_steps,
            step=step,
            **_numbers_of(metadata),
        )
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"checkpoint {folder}: {FILE_NAME} is broken ({reason_of(error)}); write the checkpoint again"
        ) from None
