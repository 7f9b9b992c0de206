"""Starting a command again in several processes, through torch's own launcher, or being one of several already.

Wanted by `--nproc N`, by LLaMA-Factory's FORCE_TORCHRUN=1 with NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR
and MASTER_PORT, or by a `deepspeed:` key. A process that a launcher started already (torchrun, accelerate,
or srun with a task a GPU) is left as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import zlib
from collections.abc import Mapping, Sequence

from dataflex.config import RunConfig
from dataflex.errors import DataflexError, UsageError

LAUNCHED = "DATAFLEX_LAUNCHED"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Between the signal that the launcher passes on and SIGKILL: a batch and a checkpoint, yet no long hang.
GRACE_SECONDS = "20"


def launch_arguments(config: RunConfig, nproc: int | None, environment: Mapping[str, str]) -> list[str] | None:
    """torchrun's options for this command, or None where this one process is what is wanted.

    Raises:
        UsageError: naming a variable that holds no number.
    """
    if "RANK" in environment:
        return None
    nodes = _number(environment, "NNODES", 1)
    if not (_forced(environment) or config.deepspeed or (nproc or 1) > 1):
        return None
    here = nproc or _number(environment, "NPROC_PER_NODE", 0) or max(1, visible_gpus())
    options = ["--nproc-per-node", str(here), "--max-restarts", "0"]
    if nodes == 1 and "MASTER_PORT" not in environment:
        return [*options, "--standalone"]
    return [
        *options,
        "--nnodes",
        str(nodes),
        "--node-rank",
        str(_number(environment, "NODE_RANK", 0)),
        "--master-addr",
        environment.get("MASTER_ADDR", "127.0.0.1"),
        "--master-port",
        str(_number(environment, "MASTER_PORT", 29500)),
    ]


def slurm_variables(nproc: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of an `srun` that starts a task a process; empty where this is none.

    Only a job step of several tasks counts: a batch script and an interactive shell have SLURM's variables too. Where
    a launcher is asked for (FORCE_TORCHRUN, NNODES, NPROC_PER_NODE, or `nproc`), the tasks are nodes, each with a
    launcher of its own; `--nproc 1` makes each task a run of its own, on a GPU of its own.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if nproc == 1 and "," in visible:
        gpus = visible.split(",")
        return {"CUDA_VISIBLE_DEVICES": gpus[_number(environment, "SLURM_LOCALID", 0) % len(gpus)]}
    if _forced(environment) or nproc is not None or {"NNODES", "NPROC_PER_NODE"} & environment.keys():
        return {}
    bound = visible != "" and "," not in visible  # the task sees the GPU it is bound to, and no other
    job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if bound else environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # the same in every task, and seldom that of another job on the machine
        "MASTER_PORT": str(20000 + zlib.crc32(job.encode()) % 10000),
    }
    return {name: environment.get(name, value) for name, value in found.items()}


def first_host(hosts: str) -> str:
    """The first name in a SLURM host list: `gpu003` of `gpu[003-010,12],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else hosts)


def launch(options: Sequence[str], arguments: Sequence[str]) -> int:
    """Run `dataflex ARGUMENTS` under torchrun and return the exit code of the first process that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # the failed process has said what is wrong; the launcher's report on it is for the launcher's authors
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    parsed = get_args_parser().parse_args([*options, "--module", "dataflex"])
    parsed.training_script_args = list(arguments)  # past the parser, which would take some of them for its own
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(parsed.nproc_per_node))))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    os.environ[LAUNCHED] = "1"
    try:
        run(parsed)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            raise DataflexError(
                f"a process was killed by signal {-code}; the same command goes on from there"
            ) from None
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def end_with_launcher() -> None:
    """Let this process be killed when the launcher that started it is: it has a session of its own, and would
    otherwise go on unseen and meet the next run in the same output directory."""
    if os.environ.get(LAUNCHED) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forced(environment: Mapping[str, str]) -> bool:
    return environment.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y", "yes")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UsageError(f"environment variable {name} is {text!r}; expected a number")
    return int(text)


def visible_gpus() -> int:
    """How many GPUs torch finds."""
    import torch

    return torch.cuda.device_count()
