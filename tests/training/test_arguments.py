"""What a YAML says of training is what transformers is told."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from dataflex import load_config
from dataflex.config import RunConfig, save_config
from dataflex.errors import UsageError
from dataflex.origin import origin
from dataflex.provenance import RunRecord, find_record
from dataflex.training.arguments import KNOWN, training_arguments
from dataflex.training.resume import check_resume

# YAML key, its value, and what TrainingArguments holds then: (attribute, value), the same pair where left out
SAME = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "ddp_broadcast_buffers": False,
    "ddp_bucket_cap_mb": 50,
    "ddp_find_unused_parameters": True,
    "ddp_static_graph": True,
    "ddp_timeout": 18000,
    "eval_accumulation_steps": 4,
    "eval_delay": 2.0,
    "eval_on_start": True,
    "eval_steps": 7,
    "eval_strategy": "steps",
    "full_determinism": True,
    "gradient_accumulation_steps": 3,
    "greater_is_better": False,
    "learning_rate": 3e-4,
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "logging_steps": 0.25,
    "logging_strategy": "epoch",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "max_grad_norm": 0.5,
    "metric_for_best_model": "eval_loss",
    "neftune_noise_alpha": 5.0,
    "num_train_epochs": 2.0,
    "optim": "adamw_torch",
    "output_dir": "out",
    "per_device_eval_batch_size": 5,
    "per_device_train_batch_size": 6,
    "prediction_loss_only": True,
    "project": "mine",
    "run_name": "try",
    "save_only_model": True,
    "save_steps": 9,
    "save_strategy": "epoch",
    "seed": 7,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 4,
    "trackio_space_id": "me/space",
    "warmup_steps": 3,
    "weight_decay": 0.1,
}  # fmt: skip
OTHERWISE = [
    ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_steps", 5),
    ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
    ({"eval_strategy": "steps", "logging_steps": 3}, "eval_steps", 3),
    ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen", "all"),
    ({}, "gradient_checkpointing", True),
    ({"gradient_checkpointing": False}, "gradient_checkpointing", False),
    ({"activation_checkpointing": False}, "gradient_checkpointing", False),
    ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", False),
    ({"disable_gradient_checkpointing": True, "gradient_checkpointing": True}, "gradient_checkpointing", False),
    ({"bf16": True, "pure_bf16": True}, "bf16", False),
    ({"report_to": None}, "report_to", []),
    ({"report_to": []}, "report_to", []),
    ({"tf32": None}, "tf32", None),
    ({"overwrite_output_dir": True}, "output_dir", "out"),
    ({"resume_from_checkpoint": True}, "resume_from_checkpoint", None),
    ({}, "ddp_find_unused_parameters", False),
    ({}, "max_steps", 11),
    ({"save_total_limit": 2}, "save_total_limit", None),  # kept by the run itself, once a new checkpoint is sealed
    ({}, "remove_unused_columns", False),
    ({}, "label_names", ["labels"]),
]


def from_yaml(folder: Path, **keys: object) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", **keys}))
    return load_config(path)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_keys_of_the_same_name_come_through(tmp_path: Path):
    defaults = {field: getattr(TrainingArguments("out"), field) for field in SAME}
    assert [key for key, value in SAME.items() if value == defaults[key]] == ["output_dir"]
    args = training_arguments(from_yaml(tmp_path, **SAME), 11)
    assert {key: getattr(args, key) for key in SAME} == SAME


@pytest.mark.parametrize("keys, attribute, value", OTHERWISE)
def test_keys_of_another_name_or_meaning(tmp_path: Path, keys: dict, attribute: str, value: object):
    assert getattr(training_arguments(from_yaml(tmp_path, **keys), 11), attribute) == value


def test_an_override_wins_over_a_further_key_of_the_yaml(tmp_path: Path):
    from_yaml(tmp_path, logging_first_step=True, eval_delay=3)
    config = load_config(tmp_path / "run.yaml", ["logging_first_step=false"], {"eval_delay": 4})
    assert config.training_arguments == {"logging_first_step": False, "eval_delay": 4}


def test_a_run_is_told_from_another_by_the_further_keys_that_change_it(tmp_path: Path):
    plain, tuned = from_yaml(tmp_path), from_yaml(tmp_path, metric_for_best_model="loss", log_level="error")
    before, after = origin(plain, "train", {}, {}), origin(tuned, "train", {}, {})
    assert {key: value for key, value in after.keys.items() if before.keys[key] != value} == {
        "metric_for_best_model": "loss"
    }
    for first, then in ((before, after), (after, before)):  # a key that is gone is a difference as well
        record = RunRecord(tmp_path, {"finished": False, "origin": first.as_json()})
        record.note()
        with pytest.raises(UsageError, match=r"differs in metric_for_best_model \("):
            find_record(plain.changed(output_dir=str(tmp_path)), then)


def test_further_keys_survive_being_saved_and_changed(tmp_path: Path):
    config = from_yaml(tmp_path, eval_on_start=True, eval_delay="1e-1", trackio_static_space_id=False)
    save_config(config, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["eval_on_start"], saved["eval_delay"]) == (True, 0.1)  # a text in YAML 1.1, a number all the same
    assert "training_arguments" not in saved
    again = load_config(tmp_path / "config.yaml")
    assert again == config.changed() == config
    assert again.changed(seed=1).training_arguments == config.training_arguments


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"eval_delay": -1}, "key 'eval_delay': input should be greater than or equal to 0, not -1"),
        ({"logging_first_step": "maybe"}, "key 'logging_first_step'"),
        ({"logging_strategy": "sometimes"}, "key 'logging_strategy'"),
        ({"logging_first_stepp": True}, "'logging_first_stepp': unknown; did you mean 'logging_first_step'"),
        ({"training_arguments": {"fsdp": "full_shard"}}, "key 'fsdp'"),
        ({"training_arguments": 3}, "key 'training_arguments'"),
        ({"evaluation_strategy": "no", "eval_strategy": "no"}, "the former name of 'eval_strategy'"),
        ({"save_steps": 1.5}, "key 'save_steps': expected a whole number of steps"),
        ({"save_steps": 0}, "key 'save_steps'"),
    ],
)
def test_wrong_keys_are_told_when_the_yaml_is_read(tmp_path: Path, keys: dict, said: str):
    with pytest.raises(UsageError) as caught:
        from_yaml(tmp_path, **keys)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"report_to": "wandbb"}, "wandbb is not supported, only .*wandb"),
        ({"report_to": "none,wandbb"}, "is not supported"),
        ({"dataloader_prefetch_factor": 2}, "key dataloader_prefetch_factor"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "key lr_scheduler_type"),
    ],
)
def test_what_transformers_does_not_take_is_a_usage_error(tmp_path: Path, keys: dict, said: str):
    with pytest.raises(UsageError, match=said):
        training_arguments(from_yaml(tmp_path, **keys), 11)


def test_a_tracker_that_is_not_installed_shows_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(UsageError, match=r"report_to: .*wandb"):
        training_arguments(from_yaml(tmp_path, report_to="wandb"), 11)


def test_a_process_has_one_gpu_of_many(tmp_path: Path, monkeypatch):
    """Left at 8, transformers would split each batch over all of them, and scale its loss by their number."""
    as_made = TrainingArguments.__post_init__

    def on_eight_gpus(self: TrainingArguments) -> None:
        as_made(self)
        self._n_gpu = 8

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_eight_gpus)
    arguments = training_arguments(from_yaml(tmp_path), 11)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == arguments.per_device_train_batch_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may well have TF32")
def test_tf32_without_a_gpu_for_it(tmp_path: Path):
    with pytest.raises(UsageError, match=r"key tf32: .*Ampere"):
        training_arguments(from_yaml(tmp_path, tf32=True), 11)


def test_a_key_the_installed_transformers_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dataflex.training.arguments.KNOWN", KNOWN - {"project"})
    with pytest.raises(UsageError, match="key project: the installed transformers"):
        training_arguments(from_yaml(tmp_path, project="mine"), 11)


def test_an_older_transformers_is_told_of_checkpointing_by_its_own_name(monkeypatch: pytest.MonkeyPatch):
    from dataflex.training import arguments

    new = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    monkeypatch.setattr(arguments, "KNOWN", KNOWN - new)
    kwargs = {"use_reentrant": False}
    assert arguments._checkpointing(True) == {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": kwargs,
    }


def test_tensorboards_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    training_arguments(from_yaml(tmp_path), 11)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "before"
    training_arguments(from_yaml(tmp_path, logging_dir="there"), 11)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "there"


class TestResume:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for step in (8, 10, 12):
            (tmp_path / f"checkpoint-{step}").mkdir()
        for step in (8, 10):  # the third was cut off before its moments were written
            (tmp_path / f"checkpoint-{step}" / "moments.safetensors").touch()
        return tmp_path

    @pytest.mark.parametrize("wish", [None, True, "{}/checkpoint-10", "{}/../{name}/checkpoint-10/"])
    def test_going_on_from_the_newest_checkpoint(self, folder: Path, wish: bool | str | None):
        check_resume(wish.format(folder, name=folder.name) if isinstance(wish, str) else wish, folder)
        assert len(list(folder.iterdir())) == 3

    def test_a_first_start(self, tmp_path: Path):
        for wish in (None, True, False):
            check_resume(wish, tmp_path)

    @pytest.mark.parametrize("name", ["checkpoint-8", "checkpoint-12", "checkpoint-99", "../elsewhere"])
    def test_any_other_course_is_refused(self, folder: Path, name: str):
        with pytest.raises(UsageError, match=r"the newest is .*checkpoint-10\. .*adapter_name_or_path"):
            check_resume(str(folder / name), folder)

    def test_false_refuses_to_go_on(self, folder: Path):
        with pytest.raises(UsageError, match=r"false, but .*checkpoint-10 is there; give --overwrite"):
            check_resume(False, folder)
