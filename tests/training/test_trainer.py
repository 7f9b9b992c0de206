"""What a training leaves behind: checkpoints with moments by name, logs, and the rows it was told to take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dataflex import load_config, train, warmup
from dataflex.training.moments import load_moments


@pytest.fixture
def config(tiny_model_dir: Path, data_dir: Path, tmp_path: Path):
    return load_config(
        options={
            "model_name_or_path": str(tiny_model_dir),
            "dataset": "identity",
            "dataset_dir": str(data_dir),
            "template": "qwen",
            "cutoff_len": 64,
            "max_samples": 20,
            "lora_rank": 4,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_step": 5,
            "logging_steps": 1,
            "save_steps": 2,
            "plot_loss": True,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-7,
        }
    )


def test_a_checkpoint_holds_the_optimizers_moments_by_adapter_name(config):
    last = warmup(config)
    assert last.name == "checkpoint-5"
    assert sorted(path.name for path in last.parent.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    ]
    adapter = load_file(last / "adapter_model.safetensors")
    moments = load_moments(last)
    assert moments.exp_avg.keys() == moments.exp_avg_sq.keys() == adapter.keys()
    assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (5, 0.9, 0.98, 1e-7)
    # linear decay from 1e-3 over 5 steps: the fifth step was taken at 1/5 of the peak
    assert moments.learning_rate == pytest.approx(2e-4)
    assert load_moments(last.parent / "checkpoint-2").learning_rate == pytest.approx(8e-4)

    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    held = [state[index] for index in range(len(adapter))]
    assert len(held) == len(moments.exp_avg)
    # the optimizer numbers parameters in module order, A before B, as the moments' names stand in the file's layout
    for one, (name, value) in zip(held, moments_in_module_order(last, moments.exp_avg), strict=True):
        assert torch.equal(one["exp_avg"], value), name
        assert torch.equal(one["exp_avg_sq"], moments.exp_avg_sq[name]), name

    with safe_open(last / "moments.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"step", "learning_rate", "beta1", "beta2", "eps"}
        assert {key.split("/")[0] for key in file.keys()}  # noqa: SIM118 (a safetensors handle is not a mapping) == {"exp_avg", "exp_avg_sq"}


def moments_in_module_order(folder: Path, tensors: dict[str, torch.Tensor]):
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def key(name: str) -> tuple:
        parts = name.split(".")
        return int(parts[parts.index("layers") + 1]), order.index(parts[-3]), parts[-2]

    return [(name, tensors[name]) for name in sorted(tensors, key=key)]


def test_train_passes_over_all_rows_and_writes_what_it_should(config):
    folder = train(config.changed(num_train_epochs=2.0))
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "trainer_state.json",
        "trainer_log.jsonl",
        "training_loss.png",
        "config.yaml",
        "run.json",
        "train_results.json",
    } <= {path.name for path in folder.iterdir()}
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in log] == list(range(1, 11))
    assert {
        "current_steps",
        "total_steps",
        "loss",
        "lr",
        "epoch",
        "percentage",
        "elapsed_time",
        "remaining_time",
    } == set(log[0])
    assert log[-1]["epoch"] == 2.0
    assert log[-1]["loss"] < log[0]["loss"]
    run = json.loads((folder / "run.json").read_text())
    assert run["rows"] == 20
    assert load_config(folder / "config.yaml") == load_config(folder / "config.yaml", ["seed=42"])


def test_the_moments_are_written_under_save_only_model(config):
    last = warmup(config.changed(save_only_model=True, save_strategy="no"))
    assert not (last / "optimizer.pt").exists()
    assert load_moments(last).step == 5


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(config, tmp_path):
    first, second, third = (
        load_file(
            train(config.changed(output_dir=str(tmp_path / str(n)), max_steps=3, seed=seed))
            / "adapter_model.safetensors"
        )
        for n, seed in enumerate([1, 1, 2])
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_training_goes_on_from_an_adapter(config, tmp_path):
    first = train(config.changed(max_steps=3))
    second = train(
        config.changed(
            max_steps=1, learning_rate=1e-12, adapter_name_or_path=[str(first)], output_dir=str(tmp_path / "next")
        )
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
