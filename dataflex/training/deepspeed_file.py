"""The DeepSpeed configuration file: whether it is one, and whether it says what the run's keys say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig, needed
from dataflex.errors import UsageError

OBJECTS = ("fp16", "bf16", "optimizer", "optimizer.params", "zero_optimization", "zero_optimization.offload_optimizer")
"""Names in the file under which an object stands, outer ones first."""


def read_deepspeed(path: str) -> dict[str, Any]:
    """The settings in a DeepSpeed configuration file.

    Raises:
        UsageError: unless it is a JSON object, with objects under OBJECTS and a ZeRO stage.
    """
    what = f"deepspeed {path}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: not JSON ({error}); name a DeepSpeed configuration") from None
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror or error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{what}: expected an object of settings, found {type(found).__name__}")
    for name in OBJECTS:
        value = value_of(found, name)
        if not isinstance(value, dict | None):
            raise UsageError(f"{what}: expected an object under {name}, found {value!r}")
    stage = value_of(found, "zero_optimization.stage")
    if isinstance(stage, bool) or stage not in (None, 0, 1, 2, 3):
        raise UsageError(f"{what}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    return found


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """The value under a name such as zero_optimization.stage; None where it is not there."""
    value: Any = settings
    for part in name.split("."):
        value = None if value is None else value.get(part)
    return value


def check_deepspeed(config: RunConfig) -> None:
    """Raise a UsageError where the file names another value than the key of the run; "auto" takes the key's.

    The trainer compares them as well, after the run has begun.
    """
    settings = read_deepspeed(needed(config.deepspeed))
    keys = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", config.per_device_train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "train_batch_size": ("the rows of a step over all processes", config.rows_per_step),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "optimizer.params.lr": ("learning_rate", config.learning_rate),
        "optimizer.params.betas": ("adam_beta1 and adam_beta2", [config.adam_beta1, config.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", config.adam_epsilon),
        "optimizer.params.weight_decay": ("weight_decay", config.weight_decay),
    }
    differing = [
        f"{name} is {value_of(settings, name)!r}, and {key} {wanted}"
        for name, (key, wanted) in keys.items()
        if value_of(settings, name) not in (None, "auto", wanted)
    ]
    if differing:
        raise UsageError(f'deepspeed {config.deepspeed}: {"; ".join(differing)}; write "auto" there')
