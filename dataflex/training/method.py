"""How a run is trained: in one process, by DDP or by DeepSpeed. A checkpoint says it, and only fits the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dataflex.config import RunConfig
from dataflex.training.deepspeed_file import read_deepspeed, value_of


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
    enabled = {name: value_of(settings, f"{name}.enabled") for name in asked}
    for name in asked:  # transformers fills "auto" in for evaluation in half precision as well
        asked[name] = asked[name] or bool(config.training_arguments.get(f"{name}_full_eval"))
    precisions = [name for name, on in enabled.items() if on is True or (on == "auto" and asked[name])]
    stage = value_of(settings, "zero_optimization.stage") or 0
    offload = value_of(settings, "zero_optimization.offload_optimizer.device") not in (None, "none")
    return TrainingMethod(config.world_size, precisions[0] if precisions else "no", stage, offload)


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
