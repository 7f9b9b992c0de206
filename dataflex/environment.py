"""What the environment tells this process: its place among the processes of a run, and nothing else. Free of torch.

torchrun, accelerate and `--nproc` set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. A SLURM step has variables of
its own, which `slurm_variables` turns into torch's. Variables that the libraries would read over the YAML are kept
from them while a training runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping

from dataflex.errors import UsageError

# Variables of another way to train; where one is on, no setting of the YAML describes the run that was asked for.
OTHER_WAYS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
)
# Variables by which accelerate, Trainer or DeepSpeed would set what the YAML sets, or count the processes anew.
_BACK_DOOR = re.compile(
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD|MPI)_\w+"
    r"|FORK_LAUNCHED|SM_HP_MP_PARAMETERS|KUBEFLOW_TRAINER_SERVER_URL"
)
# Of these, what a run's numbers do not depend on.
HARMLESS = {"ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}
# How many processes a run would have, for the dry run of it, which is alone.
PLANNED = "DATAFLEX_PLANNED_PROCESSES"
_COUNTS = re.compile(r"(PMI|OMPI|MV2|MPI)_\w+")
_NOTHING = {"", "0", "1", "-1", "no", "none", "false", "default", "auto"}


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return "RANK" in environment


def rank() -> int:
    """This process's number in the run; rank 0 prints and writes shared files."""
    return number(os.environ, "RANK", 0)


def world_size() -> int:
    """How many processes the run has. Without a launcher it is one, whatever WORLD_SIZE a shell has left over; a dry
    run counts those that the run would start."""
    return number(os.environ, "WORLD_SIZE" if launched() else PLANNED, 1)


def local_rank() -> int:
    """This process's number on its machine, which is also the index of its GPU."""
    return number(os.environ, "LOCAL_RANK", 0) if launched() else 0


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return number(os.environ, "LOCAL_WORLD_SIZE", 1) if launched() else 1


def without_launcher(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that runs alone, started from one that a launcher may have started."""
    of_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        key: value
        for key, value in environment.items()
        if key not in of_launcher and not key.startswith("TORCHELASTIC")
    }


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable as a number; `default` where it is unset or empty.

    Raises:
        UsageError: naming a variable that holds something else.
    """
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UsageError(f"environment variable {name} is {text!r}; expected a number")
    return int(text)


def torchrun_forced(environment: Mapping[str, str]) -> bool:
    """Whether LLaMA-Factory's FORCE_TORCHRUN asks for torch's launcher."""
    return environment.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y", "yes")


def slurm_variables(nproc: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of an `srun` that starts a task a process; empty where this is none.

    Only a job step of several tasks counts: a batch script and an interactive shell have SLURM's variables too. Where
    a launcher is asked for (FORCE_TORCHRUN, NNODES, NPROC_PER_NODE, or `nproc`), the tasks are nodes, each with a
    launcher of its own; `--nproc 1` makes each task a run of its own, on a GPU of its own.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or launched(environment) or "SLURM_PROCID" not in environment:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if nproc == 1 and "," in visible:
        gpus = visible.split(",")
        return {"CUDA_VISIBLE_DEVICES": gpus[number(environment, "SLURM_LOCALID", 0) % len(gpus)]}
    if torchrun_forced(environment) or nproc is not None or {"NNODES", "NPROC_PER_NODE"} & environment.keys():
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


def back_doors(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which a library would decide over the YAML."""
    left_over = set() if launched(environment) else {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    return {
        name: value
        for name, value in environment.items()
        if (_BACK_DOOR.fullmatch(name) and name not in HARMLESS) or name in left_over
    }


def check_back_doors(own: Mapping[str, str]) -> None:
    """Warn of the variables that would have decided otherwise than the YAML.

    Args:
        own: what the run itself sets where a variable would, by the variable's name.

    Raises:
        UsageError: a variable asks for another way to train.
    """
    found = back_doors()
    for name in OTHER_WAYS:
        if found.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t") and name not in own:
            raise UsageError(
                f"environment variable {name} is {found[name]!r}: the YAML alone says how to train; unset it"
                + (", and name a configuration as deepspeed" if name == "ACCELERATE_USE_DEEPSPEED" else "")
            )
    mattering = [
        name
        for name, value in found.items()
        if value.lower() not in {own.get(name, "").lower(), *_NOTHING} and not (launched() and _COUNTS.fullmatch(name))
    ]
    if mattering:
        warnings.warn(
            f"environment variable {', '.join(sorted(mattering))}: not read; the YAML alone decides", stacklevel=2
        )


@contextlib.contextmanager
def without_back_doors() -> Iterator[None]:
    """While the block runs, the environment has no variable by which a library would decide over the YAML."""
    former = back_doors()
    for name in former:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(former)
