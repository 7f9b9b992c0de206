"""RunConfig: every key a YAML, a `key=value` or an option may set, typed and checked all at once.

The keys are LLaMA-Factory's and DataFlex's, so their files load as they stand. The docstring under
each key is its help: the command line prints the same words.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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

from dataflex.environment import world_size
from dataflex.errors import UsageError
from dataflex.key_values import (
    as_numbers,
    as_share,
    as_shares,
    as_text,
    comma_list,
    of_table,
    only,
    or_null,
    trackers,
    whole_steps,
)
from dataflex.keys import TRAINS, USERS, Decides, Key, mark_of, select_keys
from dataflex.named import listing
from dataflex.projection import table as projection
from dataflex.selectors import table as selector_table
from dataflex.trainer_keys import TrainerKeys

T = TypeVar("T")
Names = Annotated[list[str], BeforeValidator(comma_list)]
Steps = Annotated[PositiveFloat, AfterValidator(whole_steps)]
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

# The marks of keys that have nothing more to say.
ROWS = Key(Decides.ROWS)
MODEL = Key(Decides.MODEL)
TRAINING = Key(Decides.TRAINING)
DIRECTION = Key(Decides.DIRECTION, component=True)
PROJECTION = Key(Decides.PROJECTION, component=True)
SELECTION = Key(Decides.SELECTION)
MERGE = Key(Decides.MERGE)
COMPARISON = Key(Decides.COMPARISON)
AS_RUN = Key(Decides.NOTHING)


class RunConfig(BaseModel):
    """One run, fully described. Build it with `load_config`, which also reads YAML and components."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    # --- model -----------------------------------------------------------------------------
    model_name_or_path: Annotated[
        str | None,
        Key(
            Decides.MODEL,
            path="input",
            by_content=True,
            needed_by=(*TRAINS, "grads", "merge", "bench", "eval", "compare"),
        ),
    ] = None
    """Base model: a hub id, a local directory, or a .gguf file."""
    adapter_name_or_path: Annotated[
        Names | None, Key(Decides.MODEL, path="input", by_content=True, needed_by=("merge",))
    ] = None
    """LoRA adapters on the base: `merge` folds each in, in order; training folds all but the last, which it goes on
    from."""
    create_new_adapter: Annotated[bool, Key(Decides.MODEL, by_content=True)] = False
    """Fold every one of adapter_name_or_path into the base and train a new adapter on that."""
    model_revision: Annotated[str | None, Key(Decides.MODEL, by_content=True)] = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: Annotated[bool, MODEL] = False
    """Allow the model's repository to run its own code."""
    flash_attn: Annotated[Literal["auto", "disabled", "sdpa", "fa2", "fa3"], MODEL] = "auto"
    """Attention kernel. auto: transformers' choice. disabled: eager code. sdpa: torch's. fa2, fa3: FlashAttention."""
    quantization_bit: Annotated[Literal[4, 8] | None, MODEL] = None
    """Bits of the frozen base model's weights (QLoRA), through the package bitsandbytes. null: not quantized."""
    quantization_method: Annotated[Literal["bnb"], MODEL] = "bnb"
    """Library that quantizes the base model. bnb: bitsandbytes."""
    quantization_type: Annotated[Literal["nf4", "fp4"], MODEL] = "nf4"
    """Number format of a 4-bit base model. nf4: normal float. fp4: float."""
    double_quantization: Annotated[bool, MODEL] = True
    """Quantize the scales of a 4-bit base model too."""
    upcast_layernorm: Annotated[bool, MODEL] = False
    """Keep the layer norms of the base model in float32."""

    # --- method ----------------------------------------------------------------------------
    stage: Annotated[Literal["sft"], only("sft", "rows are scored by its loss"), TRAINING] = "sft"
    """Training stage. sft: supervised fine-tuning, the only stage."""
    do_train: Annotated[bool, AS_RUN] = True
    """Ignored: the command decides what is done. LLaMA-Factory's files have the key."""
    finetuning_type: Annotated[Literal["lora"], only("lora", "gradients are taken at LoRA pairs"), TRAINING] = "lora"
    """Fine-tuning method. lora: LoRA pairs, at which gradients are taken; the only method."""
    lora_target: Annotated[Names, Field(min_length=1), TRAINING] = ["all"]
    """Modules that get a LoRA pair: names by comma, or `all` linear layers but the output head."""
    lora_rank: Annotated[PositiveInt, TRAINING] = 8
    """Rank r of each LoRA pair."""
    lora_alpha: Annotated[PositiveFloat | None, TRAINING] = None
    """Numerator of the LoRA scale lora_alpha / lora_rank. null: twice lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1), TRAINING] = 0.0
    """Dropout before each LoRA pair in training; always off while gradients are collected."""
    use_rslora: Annotated[bool, TRAINING] = False
    """true: scale by lora_alpha / sqrt(lora_rank). false: by lora_alpha / lora_rank."""

    # --- data ------------------------------------------------------------------------------
    dataset: Annotated[Names | None, Key(Decides.ROWS, path="input", needed_by=(*TRAINS, "bench", "compare"))] = None
    """Training datasets, separated by commas: names in dataset_info.json, or data files."""
    eval_dataset: Annotated[Names | None, Key(Decides.ROWS, path="input", needed_by=("dynamic", "compare"))] = None
    """Validation datasets, at which the selection aims; written like `dataset`. null: none, or those of val_size."""
    dataset_dir: Annotated[str, Key(Decides.ROWS, path="input", used_by=(*USERS[Decides.ROWS], "select"))] = "data"
    """Folder of dataset_info.json and of the files it names."""
    template: Annotated[str | None, Key(Decides.ROWS, used_by=(*USERS[Decides.ROWS], "merge"))] = None
    """Chat template by LLaMA-Factory's name. null: the template of the tokenizer."""
    cutoff_len: Annotated[PositiveInt, ROWS] = 2048
    """Longest row in tokens; longer ones are truncated as LLaMA-Factory does, and counted."""
    mix_strategy: Annotated[Literal["concat"], ROWS] = "concat"
    """How several datasets become one. concat: they follow each other."""
    max_samples: Annotated[PositiveInt | None, ROWS] = None
    """Rows used of each dataset, from its first row on. null: all rows."""
    train_on_prompt: Annotated[bool, ROWS] = False
    """Supervise prompts as well as responses."""
    mask_history: Annotated[bool, ROWS] = False
    """Supervise the last response of a conversation only."""
    enable_thinking: Annotated[bool | None, ROWS] = True
    """For templates with thoughts. true: learn an empty thought where a response has none. null: put the empty thought
    in the prompt. false: drop all thoughts."""
    preserve_thinking: Annotated[bool, ROWS] = False
    """With mask_history. true: keep the thoughts of earlier responses. false: drop them."""
    prompt_date: Annotated[date | None, ROWS] = None
    """Date in the prompt of a dated template, as 2026-01-31. null: the day on which the run or the store began."""
    val_size: Annotated[float, Field(ge=0), ROWS] = 0.0
    """Hold out this share of `dataset`, or this many rows from 1 on, as validation data in place of eval_dataset."""
    overwrite_cache: Annotated[bool, AS_RUN] = False
    """true: tokenize again. false: take the tokens from the cache where they are the same."""
    preprocessing_num_workers: Annotated[PositiveInt | None, AS_RUN] = None
    """Processes that tokenize; never more than there are cores."""
    dataloader_num_workers: Annotated[NonNegativeInt, AS_RUN] = 0
    """Processes that load evaluation batches during training; 0: the training process itself."""

    # --- training --------------------------------------------------------------------------
    output_dir: Annotated[str | None, Key(Decides.NOTHING, path="output", needed_by=TRAINS)] = None
    """Folder for the adapter, its checkpoints and everything else a run writes."""
    overwrite_output_dir: Annotated[bool, AS_RUN] = False
    """Start afresh over what a former run left in output_dir."""
    resume_from_checkpoint: Annotated[bool | str | None, AS_RUN] = None
    """The same command goes on from the newest checkpoint by itself: true or that checkpoint's path says as much,
    false refuses to go on, any other path is an error."""
    seed: Annotated[int, TRAINING] = 42
    """Seed of LoRA's initial weights, of dropout and of the order of rows."""
    per_device_train_batch_size: Annotated[PositiveInt, TRAINING] = 8
    """Rows a device trains on at once."""
    per_device_eval_batch_size: Annotated[PositiveInt, AS_RUN] = 8
    """Rows a device evaluates at once."""
    gradient_accumulation_steps: Annotated[PositiveInt, TRAINING] = 1
    """Batches summed into one optimizer step."""
    learning_rate: Annotated[PositiveFloat, TRAINING] = 5e-5
    """Peak learning rate of AdamW."""
    num_train_epochs: Annotated[PositiveFloat, Key(Decides.TRAINING, used_by=("train", "dynamic", "compare"))] = 3.0
    """Passes over the data; in `dynamic`, rounds of its schedule."""
    max_steps: Annotated[int, TRAINING] = -1
    """Optimizer steps in all; overrides the epochs when positive."""
    lr_scheduler_type: Annotated[LrSchedule, TRAINING] = "linear"
    """Learning-rate schedule by transformers' name, for instance cosine."""
    lr_scheduler_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(as_numbers), TRAINING] = None
    """Further arguments of the schedule."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1), TRAINING] = 0.0
    """Share of the steps in which the learning rate rises."""
    warmup_steps: Annotated[NonNegativeFloat, TRAINING] = 0
    """Steps in which the learning rate rises; a value below 1 is a share. Wins over warmup_ratio."""
    optim: Annotated[Literal["adamw_torch", "adamw_torch_fused"], TRAINING] = "adamw_torch_fused"
    """Optimizer; scores follow AdamW's own step."""
    weight_decay: Annotated[NonNegativeFloat, TRAINING] = 0.0
    """AdamW's weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1), TRAINING] = 0.9
    """AdamW's beta1."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1), TRAINING] = 0.999
    """AdamW's beta2."""
    adam_epsilon: Annotated[PositiveFloat, TRAINING] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[NonNegativeFloat, TRAINING] = 1.0
    """Largest norm of a batch's gradient; a larger gradient is scaled down. 0: no limit."""
    bf16: Annotated[bool, MODEL] = False
    """Compute in bfloat16; LoRA weights, moments and projections stay float32."""
    fp16: Annotated[bool, MODEL] = False
    """Compute in float16 with loss scaling."""
    pure_bf16: Annotated[bool, MODEL] = False
    """bfloat16 for the LoRA weights too."""
    disable_gradient_checkpointing: Annotated[bool, AS_RUN] = False
    """Keep activations instead of recomputing them: faster, more memory. Wins over gradient_checkpointing."""
    gradient_checkpointing: Annotated[bool, AS_RUN] = True
    """Recompute activations in the backward pass of training: slower, less memory."""
    neftune_noise_alpha: Annotated[NonNegativeFloat | None, TRAINING] = None
    """Scale of NEFTune's noise on the embeddings in training; gradients are taken without it. null: no noise."""
    logging_steps: Annotated[Steps, AS_RUN] = 10
    """Steps between two lines of trainer_log.jsonl; a value below 1 is a share of the run."""
    save_steps: Annotated[Steps, AS_RUN] = 500
    """Steps between two checkpoints; a value below 1 is a share of the run."""
    save_strategy: Annotated[Literal["no", "steps", "epoch"], AS_RUN] = "steps"
    """When to write checkpoints before the last one. steps: every save_steps. epoch: after each epoch. no: never."""
    save_total_limit: Annotated[PositiveInt | None, AS_RUN] = None
    """Checkpoints to keep, the newest ones. null: all checkpoints."""
    save_only_model: Annotated[bool, AS_RUN] = False
    """true: checkpoints have the adapter and the Adam moments, and no run can resume from them."""
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], TRAINING] = "no"
    """When to evaluate on eval_dataset. steps: every eval_steps. epoch: at the end of each epoch. no: never."""
    eval_steps: Annotated[Steps | None, TRAINING] = None
    """Steps between two evaluations; a value below 1 is a share of the run. null: logging_steps."""
    plot_loss: Annotated[bool, AS_RUN] = False
    """Draw training_loss.png."""
    report: Annotated[bool, Key(Decides.NOTHING, used_by=("dynamic", "compare"))] = True
    """Write report.html and report.json at the end of `dynamic`, with the loss on rows that were not aimed at; and of
    `compare` report.html."""
    report_to: Annotated[str | list[str], BeforeValidator(trackers), AS_RUN] = "none"
    """Experiment trackers by transformers' names, several by comma; all, or none. They are shown the selections of
    `dynamic` as well as the loss."""
    run_name: Annotated[str | None, AS_RUN] = None
    """Name of the run in a tracker. null: the tracker's choice."""
    logging_dir: Annotated[str | None, Key(Decides.NOTHING, path="output")] = None
    """Folder of the TensorBoard log. null: a folder in output_dir."""
    ddp_timeout: Annotated[PositiveInt, AS_RUN] = 1800
    """Seconds that training waits for a process that hangs; one that tokenizes or writes has a day."""
    deepspeed: Annotated[str | None, Key(Decides.NOTHING, path="input")] = None
    """DeepSpeed configuration file. null: DeepSpeed is not used."""
    training_arguments: Annotated[TrainerKeys, AS_RUN] = TrainerKeys()
    """Further keys of transformers' TrainingArguments; in a YAML they stand beside the others, without this one."""

    # --- dynamic selection -----------------------------------------------------------------
    train_type: Annotated[Literal["dynamic_select"], Key(Decides.TRAINING, used_by=("dynamic",))] = "dynamic_select"
    """DataFlex's mode. dynamic_select: select rows during training; the only mode."""
    components_cfg_file: Annotated[str | None, Key(Decides.NOTHING, path="input")] = None
    """YAML file of selectors and their parameters. null: the packaged components."""
    component_name: Annotated[str, AS_RUN] = Field(
        "less",
        description=f"Which selector picks the rows. {listing(selector_table.SELECTORS)} a+b: the mean of the z-scores "
        "of several, as less+rds. less-contrast: less with marginal and contrast pool. less-contrast-rds: both this "
        "and rds. Or a name in components_cfg_file, the name of an entry point of the group "
        "dataflex.selectors, or a class as package.module:Class.",
    )
    selector: Annotated[
        str, AfterValidator(of_table(selector_table.check_name)), Key(Decides.SCORES, used_by=("dynamic", "score"))
    ] = "less"
    """The algorithm behind component_name (its `name` in components_cfg_file)."""
    warmup_step: Annotated[NonNegativeInt, Key(Decides.TRAINING, used_by=("warmup", "dynamic", "compare"))] = 10
    """Optimizer steps on random rows before the first selection."""
    update_step: Annotated[PositiveInt, Key(Decides.TRAINING, used_by=("dynamic",))] = 10
    """Optimizer steps trained on each selection."""
    update_times: Annotated[NonNegativeInt, Key(Decides.TRAINING, used_by=("dynamic",))] = 2
    """Selections in a round of warmup_step + update_step × update_times steps."""
    train_step: Annotated[PositiveInt | None, Key(Decides.TRAINING, used_by=("dynamic",))] = None
    """Most optimizer steps of a `dynamic` run. null: all steps of its rounds."""

    # --- selector parameters ---------------------------------------------------------------
    gradient_type: Annotated[Literal["adam", "sgd", "sign"], DIRECTION] = "adam"
    """Direction of a training row. adam: the step that AdamW would take on the row alone, from the run's moments.
    sgd: the row's gradient. sign: the sign of the row's gradient."""
    eval_gradient_type: Annotated[Literal["adam", "sgd", "sign"], DIRECTION] = "sgd"
    """Direction of a validation row: its gradient (sgd), the sign of its gradient, or the Adam step on it."""
    marginal: Annotated[bool, DIRECTION] = False
    """true: an Adam direction is Γ(g) − Γ(0), without the step that AdamW would take on a zero gradient, the momentum
    that all rows share. false: it is Γ(g), the whole step."""
    grad_layers: Annotated[str | None, BeforeValidator(as_text), Field(pattern=r"^\d+(-\d+)?$"), DIRECTION] = None
    """Decoder layers whose LoRA pairs enter the direction, as 15-29; the backward pass stops at the lowest one. null:
    all layers."""
    adam_formula: Annotated[Literal["torch", "dataflex", "less"], DIRECTION] = "torch"
    """Adam's step: bias-corrected as torch's, without correction (dataflex), or with epsilon in the root (less)."""
    proj_dim: Annotated[PositiveInt | None, BeforeValidator(or_null), PROJECTION] = 8192
    """Width of a projected gradient. null: score with whole gradients and keep no store."""
    projector: Annotated[str, AfterValidator(of_table(projection.check_name)), PROJECTION] = Field(
        "sketch", description=f"Projection method. {listing(projection.PROJECTORS)}"
    )
    proj_seed: Annotated[NonNegativeInt, PROJECTION] = 123
    """Seed of the projection (`seed` in a component's params)."""
    store_dtype: Annotated[Literal["float16", "float32", "int8", "int1"], Key(Decides.STORE, component=True)] = (
        "float16"
    )
    """Number format of a stored gradient. float32 and float16: as they are. int8: scaled to the largest number of
    the row. int1: signs alone."""
    contrast: Annotated[
        NonNegativeInt | Literal["pool"],
        Key(Decides.SCORES, used_by=("dynamic", "grads", "score"), component=True),
    ] = 0
    """Take off a row's score its mean cosine with the plain gradients of reference rows of the training data. N: N
    random rows. pool: all rows; with proj_dim null this takes a second pass over them. 0: take nothing off."""
    normalise: Annotated[Literal["rows"] | None, Key(Decides.SCORES, component=True)] = None
    """rows: standardise each validation row's cosines over the training rows, so that no validation row outweighs the
    others. null: leave the cosines as they are."""
    reduce: Annotated[Literal["mean", "max", "round-robin", "rows"], Key(Decides.SCORES, component=True)] = "max"
    """How a row's scores for several subtasks become one score. mean: their mean. max: the largest. round-robin:
    subtasks take turns at picking their best row that is left. rows: validation rows take such turns."""
    loss_band: Annotated[Literal["high", "medium", "low"], Key(Decides.SCORES, component=True)] = "high"
    """Losses that the selector `loss` prefers. high: the highest. medium: those nearest the median. low: the lowest."""
    embed_model: Annotated[str | None, Key(Decides.SCORES, path="input", component=True)] = None
    """Sentence-embedding model of the selector `embed`: a folder or a hub id that sentence-transformers loads."""
    candidates: Annotated[Share | None, Key(Decides.SCORES, used_by=("dynamic",), component=True)] = None
    """Share of the training rows that `dynamic` scores anew from the second selection on: the rows with the best scores
    so far, and a tenth of the share at random. The other rows keep their last score. null: all rows."""
    prefilter: Annotated[
        Literal["bm25", "rds", "embed"] | None, Key(Decides.SCORES, used_by=("dynamic",), component=True)
    ] = None
    """Selector whose best rows are the candidates of the first selection; a row without a score is not selected. null:
    the first selection scores all rows."""
    accumulate: Annotated[bool, Key(Decides.SCORES, used_by=("dynamic",), component=True)] = True
    """true: a score is the sum over the selections so far, weighted by learning rate. false: the latest selection alone
    counts."""
    cache_dir: Annotated[str | None, Key(Decides.NOTHING, path="output", component=True)] = None
    """Folder in which `dynamic` keeps its gradient stores. null: one in output_dir, removed after each selection."""
    token_budget: Annotated[PositiveInt | None, Key(Decides.NOTHING, component=True)] = None
    """Tokens in a batch of gradient rows, padding included. null: as many as fit the free memory of the device."""
    skip_bad_rows: Annotated[bool, AS_RUN] = False
    """true: skip rows whose gradient is zero or not finite, and name them. false: such a row ends the command."""

    # --- what single commands read and write -----------------------------------------------
    checkpoint: Annotated[
        Names | None,
        Key(Decides.MODEL, used_by=("grads", "score"), needed_by=("grads",), path="input", by_content=True),
    ] = None
    """Checkpoint directories that warmup or train wrote."""
    split: Annotated[Literal["train", "eval"], Key(Decides.ROWS, used_by=("grads", "bench"))] = "train"
    """Whose gradients. train: the rows of `dataset`. eval: the rows of `eval_dataset`."""
    output: Annotated[
        str | None, Key(Decides.NOTHING, path="output", needed_by=("grads", "score", "select", "eval", "compare"))
    ] = None
    """The file to write; of `compare` the folder."""
    held_out: Annotated[
        Names | None, Key(Decides.ROWS, used_by=("eval", "compare"), needed_by=("compare",), path="input")
    ] = None
    """Datasets that `eval` and `compare` measure on, written like `dataset`. null: the validation data. Rows that
    stand in the training or validation data as well are refused."""
    allow_overlap: Annotated[bool, Key(Decides.NOTHING, used_by=("eval", "compare"))] = False
    """true: measure on held-out rows that stand in the training or validation data as well. false: refuse them."""
    max_new_tokens: Annotated[NonNegativeInt, Key(Decides.EVALUATION)] = 128
    """Longest answer in tokens that `eval` lets the model give to each prompt. 0: none."""
    rows: Annotated[str | None, Key(Decides.NOTHING, used_by=("eval",), path="output")] = None
    """File for a line of JSON for each row that `eval` measures. null: none."""
    export: Annotated[Literal["dataflow", "lm-eval"] | None, Key(Decides.NOTHING, used_by=("eval",))] = None
    """What `eval` does beside measuring. dataflow: write rows and configuration for `dataflow eval local` in a folder
    beside output. lm-eval: run lm-eval on `tasks`, or show its command where it is not installed. null: nothing."""
    tasks: Annotated[Names | None, Key(Decides.NOTHING, used_by=("eval",))] = None
    """Tasks of lm-eval, by comma: names, or YAML files of tasks. Used with export lm-eval."""
    selectors: Annotated[Names, COMPARISON] = ["less", "rds"]
    """Components to compare, by comma. Each is written like component_name. random and length are compared as well."""
    budget: Annotated[list[Share], BeforeValidator(as_shares), Field(min_length=1), COMPARISON] = [0.1]
    """Share of the rows that each arm trains on; several by comma give a curve."""
    by: Annotated[Literal["rows", "tokens"], COMPARISON] = "rows"
    """What `budget` is a share of. rows: the rows. tokens: supervised tokens, so that long rows have no advantage."""
    seeds: Annotated[PositiveInt, COMPARISON] = 3
    """Trainings of each arm, with the seeds from `seed` on."""
    deciles: Annotated[bool, COMPARISON] = False
    """Train on each tenth of each ranking as well: a ranking that helps gives lower losses for better tenths."""
    lds: Annotated[int | None, Field(ge=3), COMPARISON] = None
    """Random halves of the rows to train on for each seed, for the linear datamodeling score. null: none."""
    train_stores: Annotated[Names | None, Key(Decides.SCORES, used_by=("score",), path="input", by_content=True)] = None
    """Gradient stores of the training rows, one per checkpoint."""
    eval_stores: Annotated[Names | None, Key(Decides.SCORES, used_by=("score",), path="input", by_content=True)] = None
    """Gradient stores of the validation rows, paired with train_stores in order."""
    weights: Annotated[str, Key(Decides.SCORES, used_by=("score",))] = "lr"
    """Weight of each checkpoint. lr: the learning rate of the checkpoint. uniform: equal weights. Numbers by comma: one
    weight for each checkpoint."""
    exact: Annotated[bool, Key(Decides.SCORES, used_by=("score",))] = False
    """Score with whole gradients, taken at the checkpoints; no projection and no store."""
    scores: Annotated[str | None, Key(Decides.SELECTION, path="input", by_content=True, needed_by=("select",))] = None
    """Score file that `score` wrote."""
    data: Annotated[Names | None, Key(Decides.SELECTION, path="input", by_content=True)] = None
    """Datasets that the scores belong to, written like `dataset`. null: `dataset`."""
    top: Annotated[Share | None, BeforeValidator(as_share), SELECTION] = None
    """Share of the scored rows to select, best first, as 0.05 or 5%."""
    count: Annotated[PositiveInt | None, SELECTION] = None
    """Number of rows to select, best first."""
    threshold: Annotated[float | None, SELECTION] = None
    """Lowest score of a selected row."""
    plain: Annotated[bool, SELECTION] = False
    """Write the selected records without the field `dataflex`, which holds row number and score."""
    overwrite: Annotated[bool, AS_RUN] = False
    """Replace what is at the output path."""

    # --- merge -----------------------------------------------------------------------------
    export_dir: Annotated[str | None, Key(Decides.MERGE, path="output", needed_by=("merge",))] = None
    """Folder for the merged model."""
    export_size: Annotated[PositiveInt, MERGE] = 5
    """Largest size of a file of the merged model, in GB."""
    export_device: Annotated[Literal["cpu", "auto"], MERGE] = "cpu"
    """Device that merges. cpu: the processor. auto: a GPU if there is one."""
    export_legacy_format: Annotated[bool, MERGE] = False
    """true: write .bin files. false: write safetensors."""

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
        if self.prefilter and self.candidates is None:
            problems.append("prefilter needs candidates, the share of the rows that it leaves; set candidates")
        if len([v for v in (self.top, self.count, self.threshold) if v is not None]) > 1:
            problems.append("top, count and threshold exclude each other; keep one")
        if problems:
            raise ValueError("\n".join(problems))  # a problem a line
        return self

    def __repr__(self) -> str:
        """The keys that are set, a line for each part of a result that they decide. Secrets are left out."""
        from dataflex.key_list import HEADINGS
        from dataflex.masking import masked

        values = masked(values_of(self, [key for key in MARKS if key != "training_arguments"]))
        lines = []
        for decides, heading in HEADINGS.items():
            own = [
                f"{key}={value!r}"
                for key, value in values.items()
                if MARKS[key].decides is decides
                and (key in self.model_fields_set or (key not in RunConfig.model_fields and value is not None))
            ]
            if own:
                lines.append(f"  {heading}: {', '.join(own)}")
        return "\n".join(["RunConfig", *lines])

    __str__ = __repr__

    def changed(self, **changes: Any) -> RunConfig:
        """A copy with some keys set anew and checked again."""
        return RunConfig.model_validate({**self.model_dump(exclude_unset=True), **changes})

    @property
    def world_size(self) -> int:
        """Processes of this run, as torch's launcher announces them."""
        return world_size()

    @property
    def rows_per_step(self) -> int:
        """T: rows in one optimizer step over all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def per_row(self) -> bool:
        """Whether scores take the cosine with every single validation row, not with each subtask's mean."""
        return self.reduce == "rows" or self.normalise == "rows"

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
    def starts_afresh(self) -> bool:
        """True where training is to start over what a former run left in output_dir."""
        return self.overwrite or self.overwrite_output_dir

    @property
    def is_exact(self) -> bool:
        """True where scores are taken without projection or store."""
        return self.exact or self.proj_dim is None


def key_marks() -> dict[str, Key]:
    """The mark of every key that a YAML may set, in order.

    Raises:
        TypeError: naming a key that has none.
    """
    marks = {name: mark_of(field.metadata) for name, field in RunConfig.model_fields.items()}
    further = get_type_hints(TrainerKeys, include_extras=True)
    marks |= {name: mark_of(getattr(hint, "__metadata__", ())) for name, hint in further.items()}
    unmarked = [name for name, mark in marks.items() if mark is None]
    if unmarked:
        raise TypeError(f"keys without a mark of what they decide: {', '.join(unmarked)}")
    return {name: mark for name, mark in marks.items() if mark is not None}


MARKS = key_marks()
COMPONENT_KEYS = select_keys(MARKS, lambda mark: mark.component)
"""The keys that a component's `params` may set (its `seed` is `proj_seed` here)."""
INPUT_KEYS = select_keys(MARKS, lambda mark: mark.path == "input")
"""The keys that name something to read."""
PATH_KEYS = select_keys(MARKS, lambda mark: mark.path is not None)
"""The keys that name something to read or to write."""
ROW_KEYS = select_keys(MARKS, lambda mark: mark.decides is Decides.ROWS)
"""The keys that decide which examples there are."""


def values_of(config: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    """The values of `keys` by name, as JSON holds them. A key that TrainingArguments takes as it stands and that is
    not set is null."""
    values = config.model_dump(mode="json")
    values |= values.pop("training_arguments")
    return {key: values.get(key) for key in keys}


def default_of(key: str) -> Any:
    """The value of a key that is not set, as JSON holds it; None for a key that is not known."""
    return RunConfig().model_dump(mode="json").get(key)


def needed_keys(command: str) -> tuple[str, ...]:
    """The keys that `command` cannot run without."""
    return select_keys(MARKS, lambda mark: command in mark.needed_by)


def choices_of(key: str) -> tuple[str, ...]:
    """The values that a key may have, where they are few and named; null is left out."""
    annotation = RunConfig.model_fields[key].annotation
    parts = (annotation, *get_args(annotation))
    return next((tuple(map(str, get_args(part))) for part in parts if get_origin(part) is Literal), ())


def help_of(key: str) -> str:
    """The docstring of a key, as one line."""
    return " ".join((RunConfig.model_fields[key].description or "").split())


def require(config: RunConfig, command: str, *further: str) -> None:
    """Raise a UsageError that names every key that `command` needs and `config` lacks: those whose mark says so, and
    the `further` ones."""
    # held-out rows stand in for eval_dataset
    missing = [
        key
        for key in dict.fromkeys([*needed_keys(command), *further])
        if not getattr(config, key) and not (key == "eval_dataset" and config.val_size)
    ]
    if missing:
        lines = [f"  {key}: {help_of(key)}" for key in missing]
        raise UsageError(
            f"{command} needs {', '.join(missing)}; set it in the YAML or as key=value:\n" + "\n".join(lines)
        )


def needed(value: T | None) -> T:
    """A value that was checked to be there, for instance that of a key that `require` has found set.

    Raises:
        TypeError: if it is not there after all.
    """
    if value is None:
        raise TypeError("a value that the command needs is not there")
    return value


def save_config(config: RunConfig, path: Path, resolved: bool = True) -> None:
    """Write `config` as a YAML that `load_config` reads back; atomic. Secrets are left out.

    Args:
        resolved: the selector's parameters are written as they are and the components file is left out. False where
            several components are to be looked up: parameters that nobody set stay theirs to set.
    """
    import yaml

    from dataflex.files import write_text
    from dataflex.masking import masked

    left_out = {"components_cfg_file", "component_name"} if resolved else {*COMPONENT_KEYS} - config.model_fields_set
    values = config.model_dump(exclude_none=True, exclude=left_out)
    values.update(values.pop("training_arguments"))
    if config.proj_dim is None and "proj_dim" not in left_out:
        values["proj_dim"] = None  # null means exact scores; leaving it out would mean the default
    write_text(path, yaml.safe_dump(masked(values), sort_keys=False, allow_unicode=True))
