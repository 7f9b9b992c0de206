"""The keys of transformers' TrainingArguments that are handed to it as they stand.

They need no code of ours, only a name and a type; those that do are fields of RunConfig. What is in neither is
told apart in peer_keys.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, NonNegativeFloat, PositiveInt, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from dataflex.keys import Decides, Key

TRAINING = Key(Decides.TRAINING)
AS_RUN = Key(Decides.NOTHING)


@with_config(ConfigDict(extra="forbid"))
class TrainerKeys(TypedDict, total=False):
    """Further keys of a run, each under its own name in a YAML."""

    # numbers
    average_tokens_across_devices: Annotated[bool, TRAINING]
    bf16_full_eval: Annotated[bool, TRAINING]
    fp16_full_eval: Annotated[bool, TRAINING]
    full_determinism: Annotated[bool, TRAINING]
    tf32: Annotated[bool, TRAINING]
    torch_empty_cache_steps: Annotated[PositiveInt, AS_RUN]
    # evaluation during training
    eval_accumulation_steps: Annotated[PositiveInt, AS_RUN]
    eval_delay: Annotated[NonNegativeFloat, TRAINING]
    eval_on_start: Annotated[bool, TRAINING]
    greater_is_better: Annotated[bool, TRAINING]
    metric_for_best_model: Annotated[Literal["loss", "eval_loss"], TRAINING]
    prediction_loss_only: Annotated[bool, AS_RUN]
    # batches of evaluation rows
    dataloader_persistent_workers: Annotated[bool, AS_RUN]
    dataloader_pin_memory: Annotated[bool, AS_RUN]
    dataloader_prefetch_factor: Annotated[PositiveInt, AS_RUN]
    # logs and trackers
    include_num_input_tokens_seen: Annotated[bool | Literal["all", "non_padding", "no"], AS_RUN]
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical", "passive"], AS_RUN]
    log_level_replica: Annotated[Literal["debug", "info", "warning", "error", "critical", "passive"], AS_RUN]
    log_on_each_node: Annotated[bool, AS_RUN]
    logging_first_step: Annotated[bool, AS_RUN]
    logging_nan_inf_filter: Annotated[bool, AS_RUN]
    logging_strategy: Annotated[Literal["no", "steps", "epoch"], AS_RUN]
    project: Annotated[str, AS_RUN]
    skip_memory_metrics: Annotated[bool, AS_RUN]
    trackio_bucket_id: Annotated[str, AS_RUN]
    trackio_space_id: Annotated[str, AS_RUN]
    trackio_static_space_id: Annotated[str | Literal[False], AS_RUN]
    # processes
    ddp_broadcast_buffers: Annotated[bool, AS_RUN]
    ddp_bucket_cap_mb: Annotated[PositiveInt, AS_RUN]
    ddp_find_unused_parameters: Annotated[bool, AS_RUN]
    ddp_static_graph: Annotated[bool, AS_RUN]
