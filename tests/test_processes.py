"""Two real processes, plain and under DeepSpeed, come to what one process comes to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataflex import load_config
from dataflex.environment import first_host, slurm_variables
from dataflex.errors import UsageError
from dataflex.launch import launch_arguments
from dataflex.training.moments import load_moments


@pytest.fixture(scope="module")
def settings(tiny_run: dict) -> dict:
    return {
        **tiny_run,
        "eval_dataset": "identity",
        "max_samples": 23,  # odd, so that the processes' shares are not equal
        "learning_rate": 1e-3,
        "disable_gradient_checkpointing": True,
    }


def run_dataflex(command: str, folder: Path, settings: dict, *options: str, **more) -> subprocess.CompletedProcess:
    arguments = [f"{key}={value}" for key, value in {**settings, **more}.items()]
    return subprocess.run(
        [sys.executable, "-m", "dataflex", command, *options, *arguments, f"output_dir={folder}"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with a space") / "one"
    done = run_dataflex("dynamic", folder, settings, per_device_train_batch_size=4)
    assert done.returncode == 0, done.stderr
    return folder


def selection(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "selections" / f"step-{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("zero", "checkpointing"),
    [*((zero, False) for zero in (None, "0", "2", "2_offload", "3", "3_offload")), (None, True), ("3", True)],
)
def test_two_processes_come_to_what_one_does(one, settings, repo, zero, checkpointing, tmp_path, monkeypatch):
    """Also where a killed process has left the lock under which torch compiles DeepSpeed's extension."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = one.parent / f"two {zero} {checkpointing}"
    more = {"deepspeed": repo / "examples" / "deepspeed" / f"ds_z{zero}_config.json"} if zero else {}
    more["disable_gradient_checkpointing"] = not checkpointing
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


ONE_WORKS_ALONE = """
import time
import torch
from dataflex import processes

def alone():
    if processes.rank() == 0:
        time.sleep(4)

class Task:
    def advance(self, amount, **shown): ...

processes.join(timeout_s=1)
alone()
processes.barrier()
alone()
said = processes.broadcast(f"from {processes.rank()}")
alone()
processes.gather(said)
alone()
processes.advance(Task())
alone()
total = torch.ones(1)
processes.sum_over([total])
print(said, total.item())
processes.leave()
"""


def test_the_others_wait_while_the_first_process_works_alone(in_two_processes):
    """A first process that tokenizes or writes for longer than ddp_timeout, here 1 s, ends nobody."""
    assert in_two_processes(ONE_WORKS_ALONE) == ["from 0 2.0"] * 2


@pytest.mark.parametrize("begun_by", [1, 2])
def test_one_process_and_two_go_on_from_each_others_checkpoint(one, settings, tmp_path, begun_by):
    """Where nothing is drawn at random, and a step has the rows it had."""
    folder = tmp_path / "out"
    options = {**settings, "max_steps": 5}
    whole = run_dataflex("train", tmp_path / "whole", options, per_device_train_batch_size=4)
    assert whole.returncode == 0, whole.stderr
    first, then = ((["--nproc", "2"], 2), ([], 4)) if begun_by == 2 else (([], 4), (["--nproc", "2"], 2))
    done = run_dataflex("train", folder, options, *first[0], per_device_train_batch_size=first[1], save_steps=3)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run.json").read_text())
    keys = {**record["origin"]["keys"], "per_device_train_batch_size": then[1]}
    (folder / "run.json").write_text(
        json.dumps({**record, "finished": False, "origin": {**record["origin"], "keys": keys}})
    )
    shutil.rmtree(folder / "checkpoint-5")
    done = run_dataflex("train", folder, options, *then[0], per_device_train_batch_size=then[1])
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "whole"))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("zero", [None, "3"])
def test_candidates_and_every_kind_of_selector_in_two_processes(settings, repo, tmp_path, zero):
    """Text, hidden states, losses, and gradients less the pool's mean, of candidates alone."""
    options = {
        **settings,
        "component_name": "less+rds+loss",
        "marginal": True,
        "contrast": "pool",
        "candidates": 0.5,
        "prefilter": "bm25",
    }
    assert run_dataflex("dynamic", tmp_path / "one", options, per_device_train_batch_size=4).returncode == 0
    more = {"deepspeed": repo / "examples" / "deepspeed" / f"ds_z{zero}_config.json"} if zero else {}
    two = run_dataflex("dynamic", tmp_path / "two", options, "--nproc", "2", per_device_train_batch_size=2, **more)
    assert two.returncode == 0, two.stderr
    for step in (3, 5):
        wanted, found = selection(tmp_path / "one", step), selection(tmp_path / "two", step)
        assert [line["row"] for line in found] == [line["row"] for line in wanted]
        # sums of z-scores, whose rounding does not shrink with the score
        ours, theirs = ([line["score"] for line in lines] for lines in (found, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


def test_zero_3_tries_gradients_before_the_first_step(one, settings, repo, tmp_path):
    """A model with a layer that is never called is refused; no step is taken."""
    folder = tmp_path / "model"
    shutil.copytree(settings["model_name_or_path"], folder)
    (folder / "modeling_idle.py").write_text(
        "from torch import nn\nfrom transformers import LlamaForCausalLM\n\n\n"
        "class IdleForCausalLM(LlamaForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.idle = nn.Linear(config.hidden_size, config.hidden_size, bias=False)\n"
    )
    config = json.loads((folder / "config.json").read_text())
    code = {"architectures": ["IdleForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_idle.IdleForCausalLM"}}
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "idle.weight": torch.eye(64)}, folder / "model.safetensors", {"format": "pt"})
    keys = {**settings, "model_name_or_path": folder, "trust_remote_code": "true", "lora_target": "q_proj,idle"}
    zero = repo / "examples" / "deepspeed" / "ds_z3_config.json"
    done = run_dataflex("warmup", tmp_path / "out", keys, "--nproc", "2", deepspeed=zero)
    assert done.returncode == 2, done.stderr
    assert "lora_target: idle is never called in a forward pass" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


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
    _refuses_code(folder, [*command[:4], *command[5:]])
    _refuses_another_way(folder, command, zero)
    done = subprocess.run(command[:4] + command[5:], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    assert [line["row"] for line in selection(folder, 5)] == [line["row"] for line in selection(one, 5)]
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, one))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def _refuses_another_way(folder: Path, command: list[str], zero: Path) -> None:
    """Without its optimizer and schedule nothing is gone on with, whatever of the way to train has changed."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    zero_3 = f"deepspeed={zero}"
    for given in ("deepspeed=null", f"deepspeed={zero.with_name('ds_z2_config.json')}"):
        other = [given if part == zero_3 else part for part in command]
        done = subprocess.run(other, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        now = "in 2 processes" if given.endswith("null") else "in 2 processes by DeepSpeed ZeRO-2"
        wanted = (
            f"checkpoint-3 was trained in 2 processes by DeepSpeed ZeRO-3, and this command would train {now}. Go on"
        )
        assert wanted in done.stderr
        assert done.stderr.count("error:") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def _refuses_code(folder: Path, command: list[str]) -> None:
    """A pickle of DeepSpeed's that would run something is refused by name, and runs nothing."""
    states = folder / "checkpoint-3" / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    listed = folder / "checkpoint-3" / "checkpoint.json"
    sound, contents = states.read_bytes(), listed.read_text()
    torch.save(TouchesAFile(folder / "touched"), states)
    changed = json.loads(contents)
    changed["files"][str(states.relative_to(folder / "checkpoint-3"))] = states.stat().st_size
    listed.write_text(json.dumps(changed))  # so that the file is read at all
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{folder}/checkpoint-3 is damaged (a file in it holds more" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "touched").exists()
    states.write_bytes(sound)
    listed.write_text(contents)


class TouchesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


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


STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_which_slurm_tasks_are_processes():
    found = slurm_variables(None, STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003"}
    assert 20000 <= port < 30000
    assert slurm_variables(None, {**STEP, "SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    assert slurm_variables(None, {**STEP, "CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"
    assert slurm_variables(None, {**STEP, "CUDA_VISIBLE_DEVICES": "MIG-8a1f"})["LOCAL_RANK"] == "0"
    assert slurm_variables(None, {**STEP, "CUDA_VISIBLE_DEVICES": "4,5"})["LOCAL_RANK"] == "1"
    assert slurm_variables(None, {**STEP, "MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"
    # torch's own launcher, a node a task, a batch script, an interactive shell
    assert slurm_variables(None, {**STEP, "RANK": "0"}) == {}
    assert slurm_variables(None, {**STEP, "FORCE_TORCHRUN": "1"}) == {}
    assert slurm_variables(8, STEP) == {}
    # runs of their own, each on the GPU of its place on the machine
    assert slurm_variables(1, STEP) == {}
    assert slurm_variables(1, {**STEP, "CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert slurm_variables(None, {**STEP, "NPROC_PER_NODE": "8"}) == {}
    assert slurm_variables(1, STEP) == {}  # tasks that have nothing to do with each other
    assert slurm_variables(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == {}
    assert slurm_variables(None, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[003-010,12],login1", "gpu003"), ("a,b", "a"), ("rack[1-2]n[07,09]-ib", "rack1n07-ib"), ("one", "one")],
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_two_slurm_tasks_are_two_processes(one, settings, tmp_path):
    arguments = [f"{key}={value}" for key, value in {**settings, "per_device_train_batch_size": 2}.items()]
    folder = tmp_path / "slurm"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "dataflex", "dynamic", *arguments, f"output_dir={folder}"],
            env={
                **os.environ,
                **STEP,
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": str(task),
                "SLURM_LOCALID": str(task),
                "SLURM_STEP_NODELIST": "localhost",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    said = [task.communicate(timeout=300) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert said[1][0] == ""  # the first alone prints
    wanted = [row["row"] for row in selection(one, 3)]
    assert len(set(wanted) & {row["row"] for row in selection(folder, 3)}) >= 0.9 * len(wanted)
