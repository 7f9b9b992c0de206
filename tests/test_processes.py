"""Two real processes, plain and under DeepSpeed, come to what one process comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file

from dataflex import load_config
from dataflex.errors import UsageError
from dataflex.launch import launch_arguments
from dataflex.training.moments import load_moments


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, data_dir: Path) -> dict:
    return {
        "model_name_or_path": tiny_model_dir,
        "dataset": "alpaca_en_demo",
        "eval_dataset": "identity",
        "dataset_dir": data_dir,
        "template": "qwen",
        "cutoff_len": 64,
        "max_samples": 23,  # odd, so that the processes' shares are not equal
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 1.0,
        "warmup_step": 3,
        "update_step": 2,
        "update_times": 2,
        "logging_steps": 1,
        "token_budget": 200,
        "proj_dim": 512,
        "disable_gradient_checkpointing": True,
    }


def run_dataflex(command: str, folder: Path, settings: dict, *options: str, **more) -> subprocess.CompletedProcess:
    arguments = [f"{key}={value}" for key, value in {**settings, **more}.items()]
    return subprocess.run(
        [sys.executable, "-m", "dataflex", command, *options, *arguments, f"output_dir={folder}"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with a space") / "one"
    done = run_dataflex("dynamic", folder, settings, per_device_train_batch_size=4)
    assert done.returncode == 0, done.stderr
    return folder


def selection(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "selections" / f"step-{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", [None, "2", "3", "3_offload"])
def test_two_processes_come_to_what_one_does(one, settings, repo, zero):
    folder = one.parent / f"two {zero}"
    more = {"deepspeed": repo / "examples" / "deepspeed" / f"ds_z{zero}_config.json"} if zero else {}
    done = run_dataflex("dynamic", folder, settings, "--nproc", "2", per_device_train_batch_size=2, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    for step in (3, 5):
        wanted, found = selection(one, step), selection(folder, step)
        assert [line["row"] for line in found] == [line["row"] for line in wanted]
        np.testing.assert_allclose(
            [line["score"] for line in found], [line["score"] for line in wanted], rtol=1e-4, atol=1e-6
        )
        for kind in ("exp_avg", "exp_avg_sq"):
            ours, theirs = (getattr(load_moments(f / f"checkpoint-{step}"), kind) for f in (folder, one))
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-8)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)
    log = [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    same = [json.loads(line)["loss"] for line in (one / "trainer_log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(log, same, rtol=1e-5)


def test_exact_scores_under_zero_3(one, settings, repo):
    exact = {**settings, "proj_dim": "null", "max_steps": 4}
    assert run_dataflex("dynamic", one.parent / "x1", exact, per_device_train_batch_size=4).returncode == 0
    zero = repo / "examples" / "deepspeed" / "ds_z3_config.json"
    two = run_dataflex(
        "dynamic", one.parent / "x2", exact, "--nproc", "2", per_device_train_batch_size=2, deepspeed=zero
    )
    assert two.returncode == 0, two.stderr
    wanted, found = selection(one.parent / "x1", 3), selection(one.parent / "x2", 3)
    assert [line["row"] for line in found] == [line["row"] for line in wanted]
    np.testing.assert_allclose([line["score"] for line in found], [line["score"] for line in wanted], rtol=1e-4)


def test_zero_3_goes_on_from_its_checkpoint(one, settings, repo):
    """Stopped by a real kill of all its processes between the selections."""
    zero = repo / "examples" / "deepspeed" / "ds_z3_config.json"
    folder = one.parent / "killed"
    arguments = [f"{k}={v}" for k, v in {**settings, "per_device_train_batch_size": 2, "deepspeed": zero}.items()]
    command = [sys.executable, "-m", "dataflex", "dynamic", "-q", "--nproc", "2", *arguments, f"output_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "selections" / "step-3.jsonl").exists():
        time.sleep(0.05)
    process.kill()  # the launcher; the others must not outlive it
    process.wait()
    time.sleep(1)
    assert not (folder / "adapter_model.safetensors").exists()
    done = subprocess.run(command[:4] + command[5:], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    assert [line["row"] for line in selection(folder, 5)] == [line["row"] for line in selection(one, 5)]
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, one))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_one_store_whatever_the_number_of_processes(one, settings):
    """No row twice, none missing, the same bytes; also when two processes finish what one began."""
    folder = one.parent / "stores"
    folder.mkdir()
    checkpoint = f"checkpoint={one / 'checkpoint-3'}"
    stores = []
    for name, options in (("alone", []), ("two", ["--nproc", "2"]), ("three", ["--nproc", "3"])):
        done = run_dataflex("grads", folder, settings, *options, checkpoint, "-o", str(folder / f"{name}.h5"))
        assert done.returncode == 0, done.stderr
        stores.append((folder / f"{name}.h5").read_bytes())
    assert stores[0] == stores[1] == stores[2]
    with h5py.File(folder / "two.h5", "r+") as file:
        assert file["done"][:].tolist() == [1] * 23
        file["done"][::3] = 0
        file["gradients"][::3] = 0
    done = run_dataflex("grads", folder, settings, checkpoint, "-o", str(folder / "two.h5"))
    assert done.returncode == 0, done.stderr
    with h5py.File(folder / "two.h5") as file, h5py.File(folder / "alone.h5") as alone:
        assert np.array_equal(file["gradients"][:], alone["gradients"][:])
        assert file["done"][:].all()


def test_a_process_that_fails_ends_all_with_one_message(one, settings):
    done = run_dataflex("grads", one.parent / "f", settings, "--nproc", "2", "checkpoint=missing", "-o", "x.h5")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "missing" in done.stderr


def test_two_launchers_are_two_nodes(one, settings):
    """NNODES=2 on one machine, as two machines would start it."""
    folder = one.parent / "nodes"
    arguments = [f"{k}={v}" for k, v in {**settings, "per_device_train_batch_size": 2}.items()]
    command = [sys.executable, "-m", "dataflex", "dynamic", *arguments, f"output_dir={folder}"]
    port = str(20000 + os.getpid() % 20000)
    nodes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "FORCE_TORCHRUN": "1",
                "NNODES": "2",
                "NODE_RANK": str(node),
                "NPROC_PER_NODE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for node in (0, 1)
    ]
    (out, err), (out1, err1) = (node.communicate(timeout=300) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err + err1
    assert (out, out1) == (f"{folder}\n", "")
    for step in (3, 5):
        assert [line["row"] for line in selection(folder, step)] == [line["row"] for line in selection(one, step)]


def test_when_to_launch():
    plain, sharded = load_config(), load_config(options={"deepspeed": __file__})
    assert launch_arguments(plain, None, {}) is None
    assert launch_arguments(plain, 1, {}) is None
    assert launch_arguments(plain, 4, {"RANK": "0"}) is None
    assert launch_arguments(plain, 4, {})[:2] == ["--nproc-per-node", "4"]
    assert launch_arguments(plain, None, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "3"})[:2] == [
        "--nproc-per-node",
        "3",
    ]
    assert launch_arguments(sharded, None, {"NPROC_PER_NODE": "2"})[:2] == ["--nproc-per-node", "2"]
    several = launch_arguments(
        plain, 1, {"FORCE_TORCHRUN": "true", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h"}
    )
    assert several[4:] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "h", "--master-port", "29500"]
    with pytest.raises(UsageError, match="NNODES is 'two'"):
        launch_arguments(plain, 1, {"NNODES": "two"})
