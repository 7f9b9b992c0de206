"""Every key and every kind of input, changed one at a time, and each command run again over what it made before.

What must happen is written down here by hand, key by key, so that the marks in RunConfig are held against a second
opinion: the result is reused, or refused with the key's name. A key that is not in the table fails.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from word_model import CHAT_TEMPLATE, make_model

import dataflex
from dataflex.config import MARKS, RunConfig
from dataflex.errors import UsageError
from dataflex.progress import SilentTask

TRAINS = ("warmup", "train", "dynamic")
COMMANDS = (*TRAINS, "grads")
ALL, NONE = COMMANDS, ()

# key → (another value, the commands for which another value is another result). Everywhere else it changes nothing.
KEYS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "model_name_or_path": ("{other_model}", ALL),
    "adapter_name_or_path": ("{adapter}", TRAINS),  # grads' adapter is the checkpoint's
    "create_new_adapter": (True, NONE),  # without adapters to fold in
    "model_revision": ("other", NONE),  # of a local folder
    "trust_remote_code": (True, ALL),
    "flash_attn": ("disabled", ALL),
    "quantization_bit": (4, ALL),
    "quantization_method": (None, NONE),
    "quantization_type": ("fp4", ALL),
    "double_quantization": (False, ALL),
    "upcast_layernorm": (True, ALL),
    "stage": (None, NONE),
    "do_train": (False, NONE),
    "finetuning_type": (None, NONE),
    "lora_target": ("q_proj", TRAINS),
    "lora_rank": (2, TRAINS),
    "lora_alpha": (3.0, TRAINS),
    "lora_dropout": (0.5, TRAINS),
    "use_rslora": (True, TRAINS),
    "dataset": ("{other_data}", ALL),
    "eval_dataset": ("{other_data}", ("dynamic",)),
    "dataset_dir": ("{folder}", NONE),  # the data are files
    "template": ("default", ALL),
    "cutoff_len": (6, ALL),
    "mix_strategy": (None, NONE),
    "max_samples": (3, ALL),
    "train_on_prompt": (True, ALL),
    "mask_history": (True, ALL),
    "enable_thinking": (False, ALL),
    "preserve_thinking": (True, NONE),  # without mask_history
    "prompt_date": ("2001-02-03", ALL),
    "val_size": (2.0, ALL),
    "overwrite_cache": (True, NONE),
    "preprocessing_num_workers": (2, NONE),
    "dataloader_num_workers": (1, NONE),
    "output_dir": (None, NONE),
    "overwrite_output_dir": (None, NONE),
    "resume_from_checkpoint": (True, NONE),
    "seed": (7, TRAINS),
    "per_device_train_batch_size": (1, TRAINS),
    "per_device_eval_batch_size": (3, NONE),
    "gradient_accumulation_steps": (2, TRAINS),
    "learning_rate": (1e-5, TRAINS),
    "num_train_epochs": (2.0, ("train", "dynamic")),
    "max_steps": (1, TRAINS),
    "lr_scheduler_type": ("cosine", TRAINS),
    "lr_scheduler_kwargs": ({}, TRAINS),
    "warmup_ratio": (0.5, TRAINS),
    "warmup_steps": (1, TRAINS),
    "optim": ("adamw_torch", TRAINS),
    "weight_decay": (0.1, TRAINS),
    "adam_beta1": (0.5, TRAINS),
    "adam_beta2": (0.5, TRAINS),
    "adam_epsilon": (1e-3, TRAINS),
    "max_grad_norm": (0.5, TRAINS),
    "bf16": (True, ALL),
    "fp16": (True, ALL),
    "pure_bf16": (True, ALL),
    "disable_gradient_checkpointing": (True, NONE),
    "gradient_checkpointing": (False, NONE),
    "neftune_noise_alpha": (1.0, TRAINS),
    "logging_steps": (2, NONE),
    "save_steps": (2, NONE),
    "save_strategy": ("epoch", NONE),
    "save_total_limit": (3, NONE),
    "save_only_model": (False, NONE),
    "eval_strategy": ("epoch", TRAINS),
    "eval_steps": (2, TRAINS),
    "plot_loss": (True, NONE),
    "report": (False, NONE),
    "report_to": ("none", NONE),
    "run_name": ("x", NONE),
    "logging_dir": ("logs", NONE),
    "ddp_timeout": (60, NONE),
    "deepspeed": (None, NONE),  # needs a launcher; a checkpoint's own record tells how it was trained
    "training_arguments": (None, NONE),  # its keys stand below by themselves
    "train_type": (None, NONE),
    "components_cfg_file": ("{components}", NONE),
    "component_name": ("random", ("dynamic",)),
    "selector": ("random", ("dynamic",)),
    "warmup_step": (3, ("warmup", "dynamic")),
    "update_step": (2, ("dynamic",)),
    "update_times": (2, ("dynamic",)),
    "train_step": (1, ("dynamic",)),
    "gradient_type": ("sgd", ("dynamic", "grads")),
    "eval_gradient_type": ("sign", ("dynamic",)),
    "adam_formula": ("less", ("dynamic", "grads")),
    "marginal": (True, ("dynamic", "grads")),
    "grad_layers": ("0", ("dynamic", "grads")),
    "contrast": ("pool", ("dynamic", "grads")),
    "normalise": ("rows", ("dynamic",)),
    "loss_band": ("low", ("dynamic",)),
    "candidates": (0.5, ("dynamic",)),
    "prefilter": (None, NONE),  # needs candidates
    "embed_model": ("x", ("dynamic",)),
    "proj_dim": (64, ("dynamic", "grads")),
    "projector": ("rademacher", ("dynamic", "grads")),
    "proj_seed": (5, ("dynamic", "grads")),
    "store_dtype": ("int8", ("dynamic", "grads")),
    "reduce": ("mean", ("dynamic",)),
    "accumulate": (False, ("dynamic",)),
    "cache_dir": ("{folder}/cache", NONE),
    "token_budget": (99, NONE),
    "skip_bad_rows": (True, NONE),
    "checkpoint": ("{other_checkpoint}", ("grads",)),
    "split": ("eval", ("grads",)),
    "output": (None, NONE),
    "held_out": ("{other_data}", NONE),
    "max_new_tokens": (3, NONE),
    "allow_overlap": (True, NONE),
    "selectors": ("bm25", NONE),
    "budget": (0.5, NONE),
    "by": ("tokens", NONE),
    "seeds": (2, NONE),
    "deciles": (True, NONE),
    "lds": (4, NONE),
    "rows": ("rows.jsonl", NONE),
    "export": ("dataflow", NONE),
    "tasks": ("gsm8k", NONE),
    "train_stores": ("a.h5", NONE),
    "eval_stores": ("a.h5", NONE),
    "weights": ("uniform", NONE),
    "exact": (None, NONE),
    "scores": ("a.jsonl", NONE),
    "data": ("{other_data}", NONE),
    "top": (0.5, NONE),
    "count": (2, NONE),
    "threshold": (0.1, NONE),
    "plain": (True, NONE),
    "overwrite": (None, NONE),
    "export_dir": ("merged", NONE),
    "export_size": (1, NONE),
    "export_device": ("auto", NONE),
    "export_legacy_format": (True, NONE),
    # the keys that TrainingArguments takes as they stand
    "average_tokens_across_devices": (True, TRAINS),
    "bf16_full_eval": (True, TRAINS),
    "fp16_full_eval": (True, TRAINS),
    "full_determinism": (True, TRAINS),
    "tf32": (False, TRAINS),
    "torch_empty_cache_steps": (1, NONE),
    "eval_accumulation_steps": (1, NONE),
    "eval_delay": (1, TRAINS),
    "eval_on_start": (True, TRAINS),
    "greater_is_better": (True, TRAINS),
    "metric_for_best_model": ("loss", TRAINS),
    "prediction_loss_only": (True, NONE),
    "dataloader_persistent_workers": (False, NONE),
    "dataloader_pin_memory": (False, NONE),
    "dataloader_prefetch_factor": (None, NONE),
    "include_num_input_tokens_seen": (True, NONE),
    "log_level": ("error", NONE),
    "log_level_replica": ("error", NONE),
    "log_on_each_node": (True, NONE),
    "logging_first_step": (True, NONE),
    "logging_nan_inf_filter": (True, NONE),
    "logging_strategy": ("steps", NONE),
    "project": ("x", NONE),
    "skip_memory_metrics": (True, NONE),
    "trackio_bucket_id": ("x", NONE),
    "trackio_space_id": ("x", NONE),
    "trackio_static_space_id": ("x", NONE),
    "ddp_broadcast_buffers": (False, NONE),
    "ddp_bucket_cap_mb": (1, NONE),
    "ddp_find_unused_parameters": (False, NONE),
    "ddp_static_graph": (True, NONE),
}

# Told under the name of what they decide rather than their own.
TOLD_AS = {
    "model_name_or_path": r"base_model: .*safetensors|model_name_or_path",
    "adapter_name_or_path": "adapter",
    "dataset": "dataset",
    "eval_dataset": "eval_dataset",
    "checkpoint": "adapter",
    "component_name": "selector",
    "split": "split",
    "eval_gradient_type": "eval_gradient_type",
}

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"w{i} w{i + 1}"},
            {"role": "assistant", "content": f"<think>w9</think> w{i + 2} w1 w2"},
        ]
    }
    for i in range(6)
]
RECORDS[3]["messages"] += RECORDS[0]["messages"]


class Reached(Exception):
    """The command has begun to work."""


class Stops(SilentTask):
    """A Progress that ends the command where training or gradients begin or have done `after` units."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.said, self.amounts = after, [], []

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0, *expected: Any) -> Iterator[Stops]:
        self.current = description
        if done:
            self.advance(done)
        yield self

    def advance(self, amount: int = 1, **shown: Any) -> None:
        if not amount or not (self.current == "training" or self.current.endswith("gradients")):
            return
        self.amounts.append(amount)
        if sum(self.amounts) > self.after:
            raise Reached

    def say(self, message: str) -> None:
        self.said.append(message)


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Ground:
    """What every case starts from: inputs that may be changed, and the results that each command made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", 0)
        self.names = {
            "other_model": str(make_model(folder / "other_model", 1)),
            "other_data": str(write_rows(folder / "other.jsonl", RECORDS[::-1])),
            "folder": str(folder),
            "components": str(folder / "components.yaml"),
        }
        (folder / "components.yaml").write_text("less:\n  name: less\n")
        self.base = {
            "model_name_or_path": str(self.model),
            "dataset": str(write_rows(folder / "train.jsonl", RECORDS)),
            "eval_dataset": str(write_rows(folder / "eval.jsonl", RECORDS[:2])),
            "cutoff_len": 32,
            "lora_rank": 1,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1.0,
            "warmup_step": 2,
            "update_step": 1,
            "update_times": 1,
            "save_steps": 1,
            "proj_dim": 32,
            "token_budget": 24,  # two rows
        }
        first = dataflex.warmup(self.config("warmup", "first", learning_rate=1e-2))
        self.names["adapter"] = str(first)
        self.names["checkpoint"] = str(first)
        self.names["other_checkpoint"] = str(dataflex.warmup(self.config("warmup", "second", seed=3)))
        self.made = {command: self.make(command) for command in COMMANDS}

    def config(self, command: str, name: str, **changes: Any) -> RunConfig:
        options = dict(self.base)
        if command == "grads":
            options |= {"checkpoint": self.names["checkpoint"], "output": str(self.folder / name)}
        else:
            options |= {"output_dir": str(self.folder / name)}
        if "val_size" in changes:  # in its place
            del options["eval_dataset"]
        further = {key: value for key, value in changes.items() if key not in RunConfig.model_fields}
        return dataflex.load_config(options={**options, **changes, **further})

    def make(self, command: str) -> dict[str, str]:
        """The names of a finished result and of one that was stopped half-way."""
        run = getattr(dataflex, command)
        run(self.config(command, f"{command}-finished"))
        with pytest.raises(Reached):
            run(self.config(command, f"{command}-half"), Stops(after=2 if command == "grads" else 1))  # 4 rows, 1 step
        return {state: f"{command}-{state}" for state in ("finished", "half")}

    def again(self, command: str, state: str, **changes: Any) -> str:
        """Run the command over its result with something changed: `reused`, or what it was refused with."""
        name = self.made[command][state]
        before = self.bytes_of(name) if state == "finished" else None
        progress = Stops()
        try:
            with contextlib.suppress(Reached):
                getattr(dataflex, command)(self.config(command, name, **changes), progress)
        except UsageError as refusal:
            return str(refusal)
        if state == "finished":
            assert self.bytes_of(name) == before
            return "reused" if progress.amounts in ([], [len(RECORDS)]) else "computed anew"
        if command == "grads":
            with dataflex.open_store(self.folder / name) as store:
                kept = progress.amounts[0] == int(store.done.sum()) > 2  # a batch has two rows at most
        else:
            kept = any("going on from step" in line for line in progress.said)
        return "reused" if kept else "nothing was kept"

    def bytes_of(self, name: str) -> dict[str, bytes]:
        path = self.folder / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return {str(file): file.read_bytes() for file in files if file.name != ".lock"}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Ground(tmp_path_factory.mktemp("walk"))


def test_every_key_is_walked() -> None:
    assert set(KEYS) == set(MARKS)


WALKED = [
    (key, command, state)
    for key, (value, _) in KEYS.items()
    if value is not None
    for command in COMMANDS
    for state in ("finished", "half")
    if (key, state) != ("token_budget", "half")  # another cut takes whole batches anew
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key, command, state", WALKED)
def test_a_changed_key(ground: Ground, key: str, command: str, state: str) -> None:
    value, decides_for = KEYS[key]
    if isinstance(value, str):
        value = value.format(**ground.names)
    outcome = ground.again(command, state, **{key: value})
    if command in decides_for:
        assert outcome not in ("reused", "computed anew", "nothing was kept")
        assert re.search(TOLD_AS.get(key, key), outcome), outcome
    else:
        assert outcome == "reused"


def rewrite_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_weights(folder: Path) -> None:
    """The same names and sizes, one number changed, and the file's times kept as they were."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x01
    path.write_bytes(bytes(data))


def other_moments(folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "moments.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: value + 1e-3 for name, value in load_file(path).items()}, path, metadata=metadata)


def longer_rows(path: Path) -> None:
    write_rows(path, [*RECORDS[:-1], RECORDS[0]])


COLUMNS = {"messages": "messages", "system": "note"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}

# What is changed → how, the commands for which that is another result, and the words in which it is told.
INPUTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "data file": (lambda folder: longer_rows(folder / "data/train.jsonl"), ALL, "data files"),
    "validation file": (
        lambda folder: longer_rows(folder / "data/eval.jsonl"),
        ("dynamic",),
        "eval_dataset: data files",
    ),
    "dataset_info.json": (
        lambda folder: rewrite_json(
            folder / "data/dataset_info.json",
            rows={"file_name": "train.jsonl", "formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS},
        ),
        ALL,
        r"dataset_info\.json of 'rows'",
    ),
    "chat template": (
        lambda folder: (folder / "model/chat_template.jinja").write_text(CHAT_TEMPLATE.replace(" end", " u end")),
        ALL,
        "template",
    ),
    "tokenizer": (
        lambda folder: (folder / "model/tokenizer.json").write_text(
            (folder / "model/tokenizer.json").read_text().replace('"w1"', '"w_"').replace('"w2"', '"w1"')
        ),
        ALL,
        "tokenizer",
    ),
    "base weights": (lambda folder: other_weights(folder / "model"), ALL, r"model\.safetensors"),
    "base config": (lambda folder: rewrite_json(folder / "model/config.json", rms_norm_eps=1e-3), ALL, r"config\.json"),
    "checkpoint's lora_alpha": (
        lambda folder: rewrite_json(folder / "checkpoint/adapter_config.json", lora_alpha=9),
        ("grads",),
        "adapter",
    ),
    "checkpoint's moments": (lambda folder: other_moments(folder / "checkpoint"), ("grads",), "moments"),
    "nothing": (lambda folder: None, NONE, ""),
    "a file's time": (lambda folder: (folder / "model/model.safetensors").touch(), NONE, ""),
    "another name beside the data": (lambda folder: (folder / "data/more.txt").write_text("x"), NONE, ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", ["finished", "half"])
@pytest.mark.parametrize("changed", INPUTS)
def test_a_changed_input(ground: Ground, tmp_path: Path, changed: str, state: str) -> None:
    change, decides_for, words = INPUTS[changed]
    shutil.copytree(ground.model, tmp_path / "model")
    shutil.copytree(ground.names["checkpoint"], tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        write_rows(tmp_path / "data" / name, [{**record, "note": "w7"} for record in RECORDS])
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
    info = {"rows": {"file_name": "train.jsonl", **entry}, "target": {"file_name": "eval.jsonl", **entry}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    here = copy.copy(ground)
    here.folder = tmp_path
    here.base = {
        **ground.base,
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": "rows",
        "eval_dataset": "target",
        "dataset_dir": str(tmp_path / "data"),
    }
    here.names = {**ground.names, "checkpoint": str(tmp_path / "checkpoint")}
    made = {command: here.make(command) for command in COMMANDS}
    change(tmp_path)
    here.made = made
    for command in COMMANDS:
        outcome = here.again(command, state)
        if command in decides_for:
            assert outcome not in ("reused", "computed anew", "nothing was kept"), command
            assert re.search(words, outcome), outcome
        else:
            assert outcome == "reused", (command, outcome)


@pytest.mark.filterwarnings("ignore")
def test_a_run_taken_up_on_another_day_keeps_its_day(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex.data import examples
    from dataflex.training import runs

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2027, 1, 2)

    clock = types.SimpleNamespace(date=Tomorrow)
    monkeypatch.setattr(examples, "datetime", clock)
    monkeypatch.setattr(runs, "datetime", clock)
    for command in COMMANDS:
        for state in ("finished", "half"):
            assert ground.again(command, state) == "reused"


@pytest.mark.filterwarnings("ignore")
def test_scores_know_their_stores_and_select_knows_its_data(ground: Ground) -> None:
    stores = {}
    for name, changes in (("train", {}), ("eval", {"split": "eval"}), ("sgd", {"gradient_type": "sgd"})):
        stores[name] = str(dataflex.grads(ground.config("grads", f"{name}.h5", **changes)))
    other = {"checkpoint": ground.names["other_checkpoint"]}
    for name, changes in (("train2", other), ("eval2", {**other, "split": "eval"})):
        stores[name] = str(dataflex.grads(ground.config("grads", f"{name}.h5", **changes)))

    def refused(train: str, validation: str) -> str:
        options = {
            "train_stores": [stores[n] for n in train.split()],
            "eval_stores": [stores[n] for n in validation.split()],
        }
        with pytest.raises(UsageError) as refusal:
            dataflex.score(dataflex.load_config(options={**options, "output": str(ground.folder / "s.jsonl")}))
        return str(refusal.value)

    assert "did you swap them?" in refused("eval", "train")
    assert "did you swap them?" in refused("train", "train")
    assert "differ in adapter" in refused("train", "eval2")
    assert "gradient_type adam and sgd" in refused("train sgd", "eval eval")

    scores = ground.folder / "scores.jsonl"
    dataflex.score(
        dataflex.load_config(
            options={
                "train_stores": [stores["train"], stores["train2"]],
                "eval_stores": [stores["eval"], stores["eval2"]],
                "output": str(scores),
            }
        )
    )
    select = {"scores": str(scores), "count": 2, "output": str(ground.folder / "subset.jsonl")}
    with pytest.raises(UsageError, match="were made from other data"):
        dataflex.select(dataflex.load_config(options={**select, "data": ground.names["other_data"]}))
    dataflex.select(dataflex.load_config(options={**select, "data": ground.base["dataset"]}))
