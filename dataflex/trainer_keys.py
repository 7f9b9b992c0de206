"""The keys of transformers' TrainingArguments that are handed to it as they stand.

They need no code of ours, only a name and a type; those that do are fields of RunConfig. What is in neither is
told apart in peer_keys.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, NonNegativeFloat, PositiveInt, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


@with_config(ConfigDict(extra="forbid"))
class TrainerKeys(TypedDict, total=False):
    """Further keys of a run, each under its own name in a YAML."""

    # numbers
    average_tokens_across_devices: bool
    bf16_full_eval: bool
    fp16_full_eval: bool
    full_determinism: bool
    tf32: bool
    torch_empty_cache_steps: PositiveInt
    # evaluation during training
    eval_accumulation_steps: PositiveInt
    eval_delay: NonNegativeFloat
    eval_on_start: bool
    greater_is_better: bool
    metric_for_best_model: Literal["loss", "eval_loss"]
    prediction_loss_only: bool
    # batches of evaluation rows
    dataloader_persistent_workers: bool
    dataloader_pin_memory: bool
    dataloader_prefetch_factor: PositiveInt
    # logs and trackers
    include_num_input_tokens_seen: bool | Literal["all", "non_padding", "no"]
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"]
    log_level_replica: Literal["debug", "info", "warning", "error", "critical", "passive"]
    log_on_each_node: bool
    logging_first_step: bool
    logging_nan_inf_filter: bool
    logging_strategy: Literal["no", "steps", "epoch"]
    project: str
    skip_memory_metrics: bool
    trackio_bucket_id: str
    trackio_space_id: str
    trackio_static_space_id: str | Literal[False]
    # processes
    ddp_broadcast_buffers: bool
    ddp_bucket_cap_mb: PositiveInt
    ddp_find_unused_parameters: bool
    ddp_static_graph: bool
