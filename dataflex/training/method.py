"""How a run is trained: in one process, by DDP or by DeepSpeed. A checkpoint says it, and only fits the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig
from dataflex.errors import UsageError


@dataclass(frozen=True)
class TrainingMethod:
    """What decides which files a checkpoint's optimizer state lies in, and what they hold."""

    processes: int
    mixed_precision: str
    """no, bf16 or fp16."""
    zero_stage: int | None = None
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    optimizer_offload: bool = False
    """Whether DeepSpeed keeps the optimizer's state off the GPU, with an Adam of its own."""

    def __str__(self) -> str:
        where = "in one process" if self.processes == 1 else f"in {self.processes} processes"
        how = "" if self.zero_stage is None else f" by {self._deepspeed()}"
        return f"{where}{how}" + ("" if self.mixed_precision == "no" else f" with {self.mixed_precision}")

    def settings(self) -> str:
        """What a command is given to train this way."""
        deepspeed = "without deepspeed" if self.zero_stage is None else f"with deepspeed naming {self._deepspeed()}"
        return f"{deepspeed}, --nproc {self.processes} and mixed precision {self.mixed_precision}"

    def equals(self, other: TrainingMethod) -> bool:
        """Whether the two come to the same weights, up to rounding, where nothing random is drawn in a step: DDP's
        processes sum what one process sums. DeepSpeed's state is in other files, one for each process and stage."""
        plain = self.zero_stage is None and other.zero_stage is None
        return plain and self.mixed_precision == other.mixed_precision

    def _deepspeed(self) -> str:
        return f"DeepSpeed ZeRO-{self.zero_stage}{' with optimizer offload' if self.optimizer_offload else ''}"


def method_of(config: RunConfig) -> TrainingMethod:
    """How a run is going to be trained."""
    asked = {"fp16": config.fp16, "bf16": config.bf16 and not config.pure_bf16}
    if config.deepspeed is None:
        return TrainingMethod(config.world_size, next((name for name, on in asked.items() if on), "no"))
    settings = read_deepspeed(config.deepspeed)
    enabled = {name: settings.get(name, {}).get("enabled", False) for name in asked}
    for name in asked:  # transformers fills "auto" in for evaluation in half precision as well
        asked[name] = asked[name] or bool(config.training_arguments.get(f"{name}_full_eval"))
    precisions = [name for name, on in enabled.items() if on is True or (on == "auto" and asked[name])]
    zero = settings.get("zero_optimization", {})
    device = zero.get("offload_optimizer", {}).get("device", "none")
    return TrainingMethod(
        config.world_size, precisions[0] if precisions else "no", zero.get("stage", 0), device != "none"
    )


def read_deepspeed(path: str) -> dict[str, Any]:
    """The settings in a DeepSpeed configuration file.

    Raises:
        UsageError: unless it is a JSON object, with objects under the names that need them and a ZeRO stage.
    """
    what = f"deepspeed {path}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: not JSON ({error}); name a DeepSpeed configuration") from None
    if not isinstance(found, dict):
        raise UsageError(f"{what}: expected an object of settings, found {type(found).__name__}")
    for name in ("fp16", "bf16", "zero_optimization", "zero_optimization.offload_optimizer"):
        place: Any = found
        for part in name.split("."):
            place = place.get(part, {})
        if not isinstance(place, dict):
            raise UsageError(f"{what}: expected an object under {name}, found {place!r}")
    if (stage := found.get("zero_optimization", {}).get("stage", 0)) not in (0, 1, 2, 3):
        raise UsageError(f"{what}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    return found


def method_of_accelerator(accelerator: Any) -> TrainingMethod:
    """How the trainer's Accelerator trains."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is None:
        return TrainingMethod(accelerator.num_processes, accelerator.mixed_precision)
    offload = plugin.hf_ds_config.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    return TrainingMethod(
        accelerator.num_processes, accelerator.mixed_precision, int(plugin.hf_ds_config._stage), offload
    )


def draws_random_numbers(config: RunConfig) -> bool:
    """Whether a training step draws random numbers. Each process draws its own, so their number decides the result."""
    from dataflex.model import load_model_config

    if config.lora_dropout or config.neftune_noise_alpha:
        return True
    architecture = load_model_config(config).get_text_config().to_dict()
    return any(
        isinstance(value, (int, float)) and value > 0
        for key, value in architecture.items()
        if "drop" in key or "jitter" in key
    )
