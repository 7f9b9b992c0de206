"""RunConfig: every key a YAML, a `key=value` or an option may set, typed and checked all at once.

The keys are LLaMA-Factory's and DataFlex's, so their files load as they stand. The docstring under
each key is its help: the command line prints the same words.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dataflex.trainer_keys import TrainerKeys


def _comma_list(value: Any) -> Any:
    """`a,b` and [a, b] mean the same; None stays None."""
    if isinstance(value, (str, os.PathLike)):
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def _report_to(value: Any) -> Any:
    if isinstance(value, str) and "," in value:
        return _comma_list(value)
    return "none" if value is None else value


def _steps(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("expected a whole number of steps, or a share of the run below 1")
    return value if value < 1 else int(value)


def _only(supported: str, reason: str) -> BeforeValidator:
    """Say why a key that has several values elsewhere has one here."""

    def check(value: Any) -> Any:
        if value != supported:
            raise ValueError(f"expected {supported}, the one there is ({reason})")
        return value

    return BeforeValidator(check)


Names = Annotated[list[str], BeforeValidator(_comma_list)]
Steps = Annotated[PositiveFloat, AfterValidator(_steps)]
LrSchedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "warmup_stable_decay",
    "greedy",
]
Share = Annotated[float, Field(gt=0, le=1)]

# The keys that a component's `params` may set (its `seed` is `proj_seed` here).
SELECTOR_KEYS = (
    "gradient_type",
    "adam_formula",
    "proj_dim",
    "projector",
    "proj_seed",
    "store_dtype",
    "reduce",
    "accumulate",
    "cache_dir",
    "token_budget",
)


class RunConfig(BaseModel):
    """One run, fully described. Build it with `load_config`, which also reads YAML and components."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    # --- model -----------------------------------------------------------------------------
    model_name_or_path: str | None = None
    """Base model: a hub id, a local directory, or a .gguf file."""
    adapter_name_or_path: Names | None = None
    """LoRA adapters on the base: `merge` folds each in, in order; training folds all but the last, which it goes on
    from."""
    create_new_adapter: bool = False
    """Fold every one of adapter_name_or_path into the base and train a new adapter on that."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Allow the model's repository to run its own code."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = "auto"
    """Attention kernel; `auto` lets transformers choose, `disabled` is its eager code."""
    quantization_bit: Literal[4, 8] | None = None
    """Load the frozen base in so many bits (QLoRA); needs the package bitsandbytes."""
    quantization_method: Literal["bnb"] = "bnb"
    """What quantizes the base on loading: bitsandbytes."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of a 4-bit base."""
    double_quantization: bool = True
    """Quantize the scales of a 4-bit base as well."""
    upcast_layernorm: bool = False
    """Keep the base's layer norms in float32."""

    # --- method ----------------------------------------------------------------------------
    stage: Annotated[Literal["sft"], _only("sft", "rows are scored by its loss")] = "sft"
    """Training stage; supervised fine-tuning is the one there is."""
    do_train: bool = True
    """Accepted for LLaMA-Factory files; the command says what is done."""
    finetuning_type: Annotated[Literal["lora"], _only("lora", "gradients are taken at LoRA pairs")] = "lora"
    """Gradients are taken at LoRA pairs, so `lora` is the one there is."""
    lora_target: Annotated[Names, Field(min_length=1)] = ["all"]
    """Modules that get a LoRA pair: names by comma, or `all` linear layers but the output head."""
    lora_rank: PositiveInt = 8
    """Rank r of each LoRA pair."""
    lora_alpha: PositiveFloat | None = None
    """LoRA scale is alpha/r; 2·r when left out."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each LoRA pair in training; always off while gradients are collected."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(r) instead of alpha/r."""

    # --- data ------------------------------------------------------------------------------
    dataset: Names | None = None
    """Training data by comma: names in dataset_info.json, or json/jsonl files."""
    eval_dataset: Names | None = None
    """Validation data that selection aims at, written like `dataset`."""
    dataset_dir: str = "data"
    """Folder that holds dataset_info.json and the files it names."""
    template: str | None = None
    """Chat template by LLaMA-Factory's name; the tokenizer's own when left out."""
    cutoff_len: PositiveInt = 2048
    """Longest row in tokens; longer ones are truncated as LLaMA-Factory does, and counted."""
    mix_strategy: Literal["concat"] = "concat"
    """How several datasets become one: one after the other."""
    max_samples: PositiveInt | None = None
    """Use only the first rows of each dataset."""
    train_on_prompt: bool = False
    """Supervise prompts as well as responses."""
    mask_history: bool = False
    """Supervise the last response of a conversation only."""
    enable_thinking: bool | None = True
    """In templates with thoughts, learn an empty one where there is none; null prompts it, false drops them all."""
    preserve_thinking: bool = False
    """With mask_history, keep the thoughts of earlier responses, which are taken out otherwise."""
    val_size: Annotated[float, Field(ge=0)] = 0.0
    """Hold out this share of `dataset`, or this many rows from 1 on, as validation data in place of eval_dataset."""
    overwrite_cache: bool = False
    """Tokenize again even where a cached result fits."""
    preprocessing_num_workers: PositiveInt | None = None
    """Processes that tokenize; never more than there are cores."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that load evaluation batches during training; training rows are in memory."""

    # --- training --------------------------------------------------------------------------
    output_dir: str | None = None
    """Folder for the adapter, its checkpoints and everything else a run writes."""
    overwrite_output_dir: bool = False
    """Start afresh over what a former run left in output_dir."""
    resume_from_checkpoint: bool | str | None = None
    """The same command goes on from the newest checkpoint by itself: true or that checkpoint's path says as much,
    false refuses to go on, any other path is an error."""
    seed: int = 42
    """Seed of LoRA's initial weights, of dropout and of the order of rows."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows a device trains on at once."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows a device evaluates at once."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches summed into one optimizer step."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of AdamW."""
    num_train_epochs: PositiveFloat = 3.0
    """Passes over the data; in `dynamic`, rounds of its schedule."""
    max_steps: int = -1
    """Optimizer steps in all; overrides the epochs when positive."""
    lr_scheduler_type: LrSchedule = "linear"
    """Learning-rate schedule by transformers' name, for instance cosine."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of the schedule."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the learning rate rises."""
    warmup_steps: NonNegativeFloat = 0
    """Steps in which the learning rate rises; a value below 1 is a share. Wins over warmup_ratio."""
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch_fused"
    """Optimizer; scores follow AdamW's own step."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's beta1."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's beta2."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the batch gradient at this norm; 0 turns it off."""
    bf16: bool = False
    """Compute in bfloat16; LoRA weights, moments and projections stay float32."""
    fp16: bool = False
    """Compute in float16 with loss scaling."""
    pure_bf16: bool = False
    """bfloat16 for the LoRA weights too."""
    disable_gradient_checkpointing: bool = False
    """Keep activations instead of recomputing them: faster, more memory. Wins over gradient_checkpointing."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass of training: slower, less memory."""
    neftune_noise_alpha: NonNegativeFloat | None = None
    """Noise on the embeddings in training; always off while gradients are collected."""
    logging_steps: Steps = 10
    """Write a line to trainer_log.jsonl every so many steps; below 1 a share of the run."""
    save_steps: Steps = 500
    """Write a checkpoint every so many steps; below 1 a share of the run."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write checkpoints; the end of the run always writes one."""
    save_total_limit: PositiveInt | None = None
    """Keep only the newest checkpoints."""
    save_only_model: bool = False
    """Leave the resume state out of checkpoints; the Adam moments are written all the same."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate on eval_dataset during training."""
    eval_steps: Steps | None = None
    """Evaluate every so many steps, below 1 a share of the run; logging_steps when left out."""
    plot_loss: bool = False
    """Draw training_loss.png."""
    report_to: Annotated[str | list[str], BeforeValidator(_report_to)] = "none"
    """Experiment trackers by transformers' names, several by comma; all, or none."""
    run_name: str | None = None
    """The run's name in a tracker."""
    logging_dir: str | None = None
    """Folder of TensorBoard's log; one in output_dir when left out."""
    ddp_timeout: PositiveInt = 1800
    """Seconds a collective operation may take."""
    deepspeed: str | None = None
    """DeepSpeed configuration file."""
    training_arguments: TrainerKeys = TrainerKeys()
    """Further keys of transformers' TrainingArguments; in a YAML they stand beside the others, without this one."""

    # --- dynamic selection -----------------------------------------------------------------
    train_type: Literal["dynamic_select"] = "dynamic_select"
    """DataFlex's mode; selecting rows is the one there is."""
    components_cfg_file: str | None = None
    """YAML of selectors and their parameters; the packaged defaults when left out."""
    component_name: str = "less"
    """Which selector picks the rows: less, random, or a name in components_cfg_file."""
    selector: Literal["less", "random"] = "less"
    """The algorithm behind component_name (its `name` in components_cfg_file)."""
    warmup_step: NonNegativeInt = 10
    """Optimizer steps on random rows before the first selection."""
    update_step: PositiveInt = 10
    """Optimizer steps trained on each selection."""
    update_times: NonNegativeInt = 2
    """Selections in a round of warmup_step + update_step × update_times steps."""
    train_step: PositiveInt | None = None
    """Optimizer steps of `dynamic` in all, when fewer than its rounds make."""

    # --- selector parameters ---------------------------------------------------------------
    gradient_type: Literal["adam", "sgd", "sign"] = "adam"
    """Direction a training row is scored by: the Adam step on that row, its gradient, or its sign."""
    eval_gradient_type: Literal["adam", "sgd", "sign"] = "sgd"
    """The same for validation rows."""
    adam_formula: Literal["torch", "dataflex", "less"] = "torch"
    """Adam's step: bias-corrected as torch's, without correction (dataflex), or with epsilon in the root (less)."""
    proj_dim: PositiveInt | None = 8192
    """Dimensions a gradient is projected to; null scores exactly and keeps no store."""
    projector: Literal["sketch", "rademacher", "fast_jl", "none"] = "sketch"
    """How: a sparse sketch (one pass over the parameters), dense random signs (rademacher; fast_jl on CUDA, through
    the package of that name), or not at all."""
    proj_seed: NonNegativeInt = 123
    """Seed of the projection (`seed` in a component's params)."""
    store_dtype: Literal["float16", "float32", "int8", "int1"] = "float16"
    """Number format of stored gradients."""
    reduce: Literal["mean", "max", "round-robin"] = "max"
    """How the subtasks of the validation data become one score."""
    accumulate: bool = True
    """Sum scores over the selections so far, weighted by learning rate; false uses the latest alone."""
    cache_dir: str | None = None
    """Folder in which `dynamic` keeps its gradient stores; removed after use when left out."""
    token_budget: PositiveInt | None = None
    """Tokens, padding included, in a batch of gradient rows; what the device's free memory allows when left out."""
    skip_bad_rows: bool = False
    """Leave out rows whose gradient is all zero or not finite, and say which; otherwise they end the command."""

    # --- what single commands read and write -----------------------------------------------
    checkpoint: Names | None = None
    """Checkpoint directories that warmup or train wrote."""
    split: Literal["train", "eval"] = "train"
    """Collect gradients of `dataset` (train) or of `eval_dataset` (eval)."""
    output: str | None = None
    """The file to write."""
    train_stores: Names | None = None
    """Gradient stores of the training rows, one per checkpoint."""
    eval_stores: Names | None = None
    """Gradient stores of the validation rows, paired with train_stores in order."""
    weights: str = "lr"
    """Weight of each checkpoint: lr (its learning rate), uniform, or numbers by comma."""
    exact: bool = False
    """Score with unprojected gradients taken from the checkpoints; no store."""
    scores: str | None = None
    """Score file that `score` wrote."""
    data: Names | None = None
    """Dataset names or files the scores belong to; `dataset` when left out."""
    top: Share | None = None
    """Select this share of the scored rows."""
    count: PositiveInt | None = None
    """Select this many rows."""
    threshold: float | None = None
    """Select the rows that score at least this."""
    plain: bool = False
    """Leave the `dataflex` field out of selected rows."""
    overwrite: bool = False
    """Replace what is at the output path."""

    # --- merge -----------------------------------------------------------------------------
    export_dir: str | None = None
    """Folder for the merged model."""
    export_size: PositiveInt = 5
    """Largest file of the merged model, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Device that merges; auto uses a GPU if there is one."""
    export_legacy_format: bool = False
    """Write .bin files instead of safetensors."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        problems = []
        if self.bf16 and self.fp16:
            problems.append("bf16 and fp16 exclude each other; keep one")
        if self.max_steps == 0 or self.max_steps < -1:
            problems.append(f"max_steps is {self.max_steps}; expected a positive number, or -1 for none")
        if self.pure_bf16 and self.upcast_layernorm:
            problems.append("pure_bf16 and upcast_layernorm exclude each other; keep one")
        if self.quantization_bit and self.export_dir:
            problems.append("quantization_bit and export_dir exclude each other; adapters are merged unquantized")
        if self.quantization_bit and (self.create_new_adapter or len(self.adapter_name_or_path or []) > 1):
            problems.append("quantization_bit leaves no adapter to be folded in; merge them into the model first")
        if self.val_size and self.eval_dataset:
            problems.append("val_size and eval_dataset exclude each other; keep one")
        if self.val_size > 1 and self.val_size != int(self.val_size):
            problems.append(f"val_size is {self.val_size}; expected a share below 1 or a whole number of rows")
        if len([v for v in (self.top, self.count, self.threshold) if v is not None]) > 1:
            problems.append("top, count and threshold exclude each other; keep one")
        if problems:
            raise ValueError("\n".join(problems))  # a problem a line
        return self

    def changed(self, **changes: Any) -> RunConfig:
        """A copy with some keys set anew and checked again."""
        return RunConfig.model_validate({**self.model_dump(exclude_unset=True), **changes})

    @property
    def world_size(self) -> int:
        """Processes of this run, as torch's launcher announces them."""
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def rows_per_step(self) -> int:
        """T: rows in one optimizer step over all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def folded_adapters(self) -> list[str]:
        """The adapters that training folds into the base, before the one it goes on from or makes."""
        adapters = self.adapter_name_or_path or []
        return adapters if self.create_new_adapter else adapters[:-1]

    @property
    def resumed_adapter(self) -> str | None:
        """The adapter that training goes on from, None for a new one."""
        return None if self.create_new_adapter or not self.adapter_name_or_path else self.adapter_name_or_path[-1]

    @property
    def is_exact(self) -> bool:
        """True where scores are taken without projection or store."""
        return self.exact or self.proj_dim is None


def help_of(key: str) -> str:
    """The docstring of a key, as one line."""
    return " ".join((RunConfig.model_fields[key].description or "").split())


def require(config: RunConfig, command: str, *keys: str) -> None:
    """Raise a UsageError that names every one of `keys` that `command` needs and `config` lacks."""
    from dataflex.errors import UsageError

    # held-out rows stand in for eval_dataset
    missing = [key for key in keys if not getattr(config, key) and not (key == "eval_dataset" and config.val_size)]
    if missing:
        lines = [f"  {key}: {help_of(key)}" for key in missing]
        raise UsageError(
            f"{command} needs {', '.join(missing)}; set it in the YAML or as key=value:\n" + "\n".join(lines)
        )


def save_config(config: RunConfig, path: Path) -> None:
    """Write `config` as a YAML that `load_config` reads back; atomic.

    The selector's parameters are resolved already, so the components file is left out; so are secrets.
    """
    import yaml

    from dataflex.files import write_text
    from dataflex.masking import masked

    values = config.model_dump(exclude_none=True, exclude={"components_cfg_file", "component_name"})
    values.update(values.pop("training_arguments"))
    if config.proj_dim is None:
        values["proj_dim"] = None  # null means exact scores; leaving it out would mean the default
    write_text(path, yaml.safe_dump(masked(values), sort_keys=False, allow_unicode=True))
