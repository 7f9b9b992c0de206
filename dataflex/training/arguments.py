"""What the YAML says of training, as transformers' TrainingArguments.

A key of the same name in both goes through as it stands; here is what has another name or another meaning.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from dataflex.config import RunConfig
from dataflex.environment import check_back_doors, without_back_doors
from dataflex.errors import UsageError
from dataflex.named import suggestion

_SCHEDULERS_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Parameters of transformers' schedule functions that the trainer sets."""

KNOWN = {field.name for field in dataclasses.fields(TrainingArguments)}


def training_arguments(config: RunConfig, total_steps: int) -> TrainingArguments:
    """The TrainingArguments of a run of `total_steps` optimizer steps.

    Raises:
        UsageError: with what transformers has to say of a value it does not take.
    """
    missing = sorted(config.training_arguments.keys() - KNOWN)
    if missing:
        raise UsageError(f"key {', '.join(missing)}: the installed transformers does not have it; upgrade it")
    values = {name: getattr(config, name) for name in type(config).model_fields if name in KNOWN}
    values |= {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every LoRA pair takes part in a step
        **config.training_arguments,
        "max_steps": total_steps,
        "save_total_limit": None,  # transformers would delete the last whole checkpoint before the new one is sealed
        "warmup_steps": config.warmup_steps or config.warmup_ratio,  # a value below 1 is a share there, too
        "eval_steps": config.eval_steps or config.logging_steps,
        "bf16": config.bf16 and not config.pure_bf16,  # pure bfloat16 leaves autocast nothing to do
        **_checkpointing(config.gradient_checkpointing and not config.disable_gradient_checkpointing),
        "resume_from_checkpoint": None,  # `fit` finds the checkpoint
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    check_back_doors(_own_settings(config))
    try:
        with without_back_doors():
            arguments = TrainingArguments(**values)
        _check_trackers(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        message = str(error).strip().splitlines()[0]
        given = config.model_fields_set | config.training_arguments.keys()
        named = [key for key in dict.fromkeys(re.findall(r"\w+", message)) if key in given and key in KNOWN]
        raise UsageError(f"{'key ' + ', '.join(named) if named else 'training keys'}: {message}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one GPU; with more, transformers would split its batches
    if config.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = config.logging_dir  # where transformers 5 looks for it
    return arguments


def check_schedule(config: RunConfig) -> None:
    """Raise a UsageError where lr_scheduler_kwargs has a name or a value that transformers' schedule does not take."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

    given = config.lr_scheduler_kwargs or {}
    if not given:
        return
    kind = SchedulerType(config.lr_scheduler_type)
    functions: dict[SchedulerType, Any] = TYPE_TO_SCHEDULER_FUNCTION
    function = functions[kind] if kind != SchedulerType.REDUCE_ON_PLATEAU else ReduceLROnPlateau
    taken = [name for name in inspect.signature(function).parameters if name not in _SCHEDULERS_OWN]
    unknown = [name for name in given if name not in taken]
    if unknown:
        raise UsageError(
            f"lr_scheduler_kwargs: the schedule {kind.value} has no {', '.join(map(str, unknown))}; "
            f"it takes {', '.join(taken) or 'no arguments'}{suggestion(str(unknown[0]), taken)}"
        )
    steps = 100  # enough for a schedule's parts to be reached
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_scheduler(kind, optimizer, steps // 10, steps, given)
        for _ in range(steps):
            optimizer.step()
            schedule.step(*([0.0] if kind == SchedulerType.REDUCE_ON_PLATEAU else []))
            if not math.isfinite(optimizer.param_groups[0]["lr"]):
                raise ValueError("the learning rate is not finite")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        values = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise UsageError(
            f"lr_scheduler_kwargs: the schedule {kind.value} does not take {values} "
            f"({str(error).strip().splitlines()[0]}); see {function.__name__} in transformers"
        ) from error


def _own_settings(config: RunConfig) -> dict[str, str]:
    """What the run sets where an environment variable would, by the variable's name."""
    precision = "fp16" if config.fp16 else "bf16" if config.bf16 and not config.pure_bf16 else "no"
    own = {
        "ACCELERATE_MIXED_PRECISION": precision,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(config.gradient_accumulation_steps),
        "ACCELERATE_GRADIENT_CLIPPING": str(config.max_grad_norm),
        "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()),
    }
    return own if config.deepspeed is None else {**own, "ACCELERATE_USE_DEEPSPEED": "true"}


def _checkpointing(on: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name this transformers has for it.

    Not reentrant: the inputs of a frozen base have no gradient, which the reentrant kind needs.
    """
    name = "activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"
    other = {"gradient_checkpointing": None} if name != "gradient_checkpointing" else {}
    return {**other, name: on, f"{name}_kwargs": {"use_reentrant": False}}


def _check_trackers(arguments: TrainingArguments) -> None:
    """Make each tracker's callback once, as the trainer does after the model is loaded: a missing one shows now."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for callback in get_reporting_integration_callbacks(arguments.report_to):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"report_to: {str(error).strip().splitlines()[0]}") from error
