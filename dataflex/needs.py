"""What each command reads and where it writes, looked at without torch: `check_needs`.

Every command's preparation begins with these checks. The command line makes them as well before it starts other
processes and before it imports torch, so that a wrong path shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from dataflex.adapter_files import adapter_folder
from dataflex.config import RunConfig, needed, require
from dataflex.config_file import with_component
from dataflex.data.catalog import find_sources
from dataflex.data.examples import split_names
from dataflex.data.templates import find_template
from dataflex.errors import UsageError
from dataflex.evaluation.dataflow import check_export
from dataflex.evaluation.lm_eval import check_tasks
from dataflex.evaluation.row_log import log_path
from dataflex.files import check_output_dir, check_output_file
from dataflex.influence.pairs import open_weighted
from dataflex.model_files import check_weights
from dataflex.projection.table import PROJECTORS
from dataflex.provenance import read_record, was_begun
from dataflex.selectors.table import compares, parts_of
from dataflex.store.reader import GradientStore
from dataflex.training.deepspeed_file import read_deepspeed
from dataflex.training.moments import FILE_NAME as MOMENTS
from dataflex.training.resume import check_resume, last_checkpoint
from dataflex.training.schedule import dynamic_schedule, warmup_steps

EXPORTED = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model*.bin.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "spiece.model", "*.py", "Modelfile", "README.md",
)  # fmt: skip
"""The files an export may consist of: only a folder of nothing else is ever replaced."""


def check_needs(config: RunConfig, command: str) -> None:
    """Raise a UsageError where a key that `command` needs is not set, a file that it reads is missing or damaged, or
    its output cannot be written."""
    CHECKS[command](config)


def _check_training(config: RunConfig) -> None:
    check_run_folder(config)
    if config.deepspeed is not None:
        read_deepspeed(config.deepspeed)
    check_rows(config, "train")
    if config.eval_strategy != "no":
        check_rows(config, "eval")
    check_weights(config)
    for path in config.adapter_name_or_path or []:
        adapter_folder(path)


def _check_train(config: RunConfig) -> None:
    require(config, "train")
    _check_training(config)


def _check_warmup(config: RunConfig) -> None:
    require(config, "warmup")
    warmup_steps(config)
    _check_training(config)


def _check_dynamic(config: RunConfig) -> None:
    require(config, "dynamic")
    check_precision(config)
    check_selector(config)
    dynamic_schedule(config)
    _check_training(config)
    check_rows(config, "eval")


def _check_grads(config: RunConfig) -> None:
    require(config, "grads", "eval_dataset" if config.split == "eval" else "dataset")
    if len(needed(config.checkpoint)) != 1:
        raise UsageError(f"grads takes one checkpoint, not {len(needed(config.checkpoint))}; write a store for each")
    if config.proj_dim is None and PROJECTORS[config.projector].needs_dim:
        raise UsageError("proj_dim null means exact scores without a store; use `score --exact`, or projector=none")
    check_precision(config)
    path = check_output_file(needed(config.output), overwrite=True)
    gradient_type = config.eval_gradient_type if config.split == "eval" else config.gradient_type
    check_rows(config, config.split)
    check_weights(config)
    check_checkpoint(needed(config.checkpoint)[0], gradient_type)
    if path.exists() and not config.overwrite:
        with GradientStore(path) as store:
            store.require_sound()


def _check_score(config: RunConfig) -> None:
    require(config, "score")
    check_output_file(needed(config.output), config.overwrite)
    how = scoring_way(config)
    if how == "stores":
        require(config, "score", "train_stores", "eval_stores")
        for train, validation in open_weighted(config)[0]:
            train.close()
            validation.close()
        return
    if config.train_stores or config.eval_stores:
        raise UsageError("exact scores need no stores; give either --exact with --checkpoint, or --train and --eval")
    if how == "selector":
        check_selector(config)
    less = how == "exact" or "less" in parts_of(config.selector)
    what = "score --exact" if how == "exact" else f"score --selector {config.selector}"
    require(config, what, "model_name_or_path", "dataset", *(["checkpoint"] if less else []))
    check_rows(config, "train")
    if less or compares(config.selector):
        check_rows(config, "eval")
    check_weights(config)
    for path in config.checkpoint or []:
        adapter_folder(path)
    if not less:
        return
    check_precision(config)
    for path in needed(config.checkpoint):
        for gradient_type in (config.gradient_type, config.eval_gradient_type):
            check_checkpoint(path, gradient_type)


def scoring_way(config: RunConfig) -> Literal["stores", "exact", "selector"]:
    """Where `score` takes its scores from: gradient stores; whole gradients; or the selector that `component_name`
    names."""
    if config.exact:
        return "exact"
    stores = config.train_stores or config.eval_stores
    return "selector" if "component_name" in config.model_fields_set and not stores else "stores"


def _check_select(config: RunConfig) -> None:
    require(config, "select")
    if not (config.data or config.dataset):
        require(config, "select", "data")
    check_output_file(needed(config.output), config.overwrite)


def _check_merge(config: RunConfig) -> None:
    require(config, "merge")
    check_export_dir(config)
    if config.template is not None:
        find_template(config.template)
    for path in needed(config.adapter_name_or_path):
        adapter_folder(path)
    check_weights(config)


def _check_bench(config: RunConfig) -> None:
    require(config, "bench")
    check_precision(config)
    check_rows(config, "train")
    check_weights(config)


def _check_eval(config: RunConfig) -> None:
    require(config, "eval", *([] if config.held_out else ["eval_dataset"]))
    # what an evaluation that was killed while it wrote has left is its own to replace
    under_way = log_path(Path(needed(config.output))).exists()
    for path in filter(None, (config.output, config.rows)):
        check_output_file(path, config.overwrite or under_way)
    if config.rows is not None and Path(config.rows).absolute() == Path(needed(config.output)).absolute():
        raise UsageError(f"output and rows both name {config.rows}; name another file for rows")
    if config.export is not None:
        EXPORT_CHECKS[config.export](config)
    check_rows(on_held_out(config), "eval")
    check_weights(config)
    for path in config.adapter_name_or_path or []:
        adapter_folder(path)


EXPORT_CHECKS = {"dataflow": check_export, "lm-eval": check_tasks}
"""By what `export` says."""


def _check_compare(config: RunConfig) -> None:
    require(config, "compare")
    if config.val_size:
        raise UsageError("compare draws rows of val_size anew for each seed; name eval_dataset, and held_out beside it")
    check_run_folder(as_run(config))
    if config.deepspeed is not None:
        read_deepspeed(config.deepspeed)
    for name in config.selectors:
        own = with_component(config, name)
        check_selector(own)
        if "less" in parts_of(own.selector):
            check_precision(own)
            for path in own.checkpoint or []:
                for gradient_type in (own.gradient_type, own.eval_gradient_type):
                    check_checkpoint(path, gradient_type)
    check_rows(config, "train")
    check_rows(config, "eval")
    check_rows(on_held_out(config), "eval")
    for source in find_sources(needed(config.dataset), config.dataset_dir):
        if source.num_samples:
            raise UsageError(
                f"dataset {source.name!r}: num_samples draws rows anew for each seed of a comparison; take it out of "
                "dataset_info.json, or name a file of the rows"
            )
    check_weights(config)
    for path in [*(config.adapter_name_or_path or []), *(config.checkpoint or [])]:
        adapter_folder(path)


def as_run(config: RunConfig) -> RunConfig:
    """`config` with the folder `output` as that of a run."""
    return config.changed(output_dir=config.output)


def on_held_out(config: RunConfig) -> RunConfig:
    """`config` with the rows that `eval` measures on as its validation data."""
    return config.changed(eval_dataset=config.held_out, val_size=0.0) if config.held_out else config


CHECKS: dict[str, Callable[[RunConfig], None]] = {
    "warmup": _check_warmup,
    "train": _check_train,
    "dynamic": _check_dynamic,
    "grads": _check_grads,
    "score": _check_score,
    "select": _check_select,
    "merge": _check_merge,
    "bench": _check_bench,
    "eval": _check_eval,
    "compare": _check_compare,
}
"""By command."""


def check_selector(config: RunConfig) -> None:
    """Raise a UsageError where a selector lacks the model that it embeds with."""
    if "embed" in (*parts_of(config.selector), config.prefilter) and config.embed_model is None:
        raise UsageError("selector 'embed' needs embed_model: the folder or hub id of a sentence-embedding model")


def check_precision(config: RunConfig) -> None:
    """Raise a UsageError for float16, which flushes gradients below 6e-8 to zero."""
    if config.fp16 and not config.pure_bf16:
        raise UsageError("fp16: gradients of single rows underflow in float16; use bf16=true, or neither")


def check_rows(config: RunConfig, split: str) -> None:
    """Raise a UsageError unless the template is known and the data of `split` are where the configuration says."""
    if config.template is not None:
        find_template(config.template)
    find_sources(split_names(config, split), config.dataset_dir)


def check_checkpoint(path: str, gradient_type: str) -> None:
    """Raise a UsageError unless `path` holds an adapter, and Adam's moments where `gradient_type` asks for them."""
    folder = adapter_folder(path)
    if gradient_type == "adam" and not (folder / MOMENTS).is_file():
        raise UsageError(
            f"gradient_type adam needs Adam moments, and checkpoint {path} has no {MOMENTS}; "
            "use a checkpoint that warmup, train or dynamic wrote, or gradient_type=sgd"
        )


def check_run_folder(config: RunConfig) -> None:
    """Raise a UsageError unless `output_dir` is new, holds a run that may go on, or may be overwritten."""
    folder = Path(needed(config.output_dir))
    check_output_dir(folder, "output_dir", was_begun(folder) or config.starts_afresh)
    if config.starts_afresh:
        return
    check_resume(config.resume_from_checkpoint, folder)
    record = read_record(folder)
    if record is not None and not record.finished:
        last_checkpoint(folder)


def check_export_dir(config: RunConfig) -> Path:
    """The folder to write, links followed; a UsageError where writing it would cost something else."""
    export_dir = check_output_dir(needed(config.export_dir), "export_dir", config.overwrite).resolve()
    for key, paths in (
        ("model_name_or_path", [config.model_name_or_path]),
        ("adapter_name_or_path", config.adapter_name_or_path),
    ):
        for path in filter(None, paths or []):
            if Path(path).exists() and Path(path).resolve().is_relative_to(export_dir):
                raise UsageError(f"export_dir {config.export_dir}: {key} {path} lies there; choose another export_dir")
    if export_dir.is_dir():
        strange = [
            path.name
            for path in sorted(export_dir.iterdir())
            if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in EXPORTED)
        ]
        if strange:
            raise UsageError(
                f"export_dir {config.export_dir} holds {strange[0]}, which is no part of an earlier export and "
                "would be lost; choose another export_dir, or empty it by hand"
            )
    return export_dir
