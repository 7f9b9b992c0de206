"""Starting a command again in several processes, through torch's own launcher, or being one of several already.

Wanted by `--nproc N`, by LLaMA-Factory's FORCE_TORCHRUN=1 with NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR
and MASTER_PORT, or by a `deepspeed:` key. A process that a launcher started already (torchrun, accelerate,
or srun with a task a GPU) is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

from dataflex.config import RunConfig
from dataflex.environment import PLANNED, launched, number, torchrun_forced
from dataflex.errors import DataflexError

LAUNCHED = "DATAFLEX_LAUNCHED"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Between the signal that the launcher passes on and SIGKILL: a batch and a checkpoint, yet no long hang.
GRACE_SECONDS = "20"


def launch_arguments(config: RunConfig, nproc: int | None, environment: Mapping[str, str]) -> list[str] | None:
    """torchrun's options for this command, or None where this one process is what is wanted.

    Raises:
        UsageError: naming a variable that holds no number.
    """
    nodes = number(environment, "NNODES", 1)
    here = processes_here(config, nproc, environment)
    if here is None:
        return None
    options = ["--nproc-per-node", str(here), "--max-restarts", "0"]
    if nodes == 1 and "MASTER_PORT" not in environment:
        return [*options, "--standalone"]
    return [
        *options,
        "--nnodes",
        str(nodes),
        "--node-rank",
        str(number(environment, "NODE_RANK", 0)),
        "--master-addr",
        environment.get("MASTER_ADDR", "127.0.0.1"),
        "--master-port",
        str(number(environment, "MASTER_PORT", 29500)),
    ]


def processes_here(config: RunConfig, nproc: int | None, environment: Mapping[str, str]) -> int | None:
    """How many processes this command starts on this machine; None where this one process is what is wanted."""
    if launched(environment) or not (torchrun_forced(environment) or config.deepspeed or (nproc or 1) > 1):
        return None
    return nproc or number(environment, "NPROC_PER_NODE", 0) or max(1, visible_gpus())


@contextlib.contextmanager
def planned_processes(
    config: RunConfig, nproc: int | None, environment: MutableMapping[str, str] = os.environ
) -> Iterator[None]:
    """While the block runs, let this one process count as many as the command would start, in `environment`."""
    here = processes_here(config, nproc, environment)
    if here is not None:
        environment[PLANNED] = str(here * number(environment, "NNODES", 1))
    try:
        yield
    finally:
        environment.pop(PLANNED, None)


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


def visible_gpus() -> int:
    """The number of GPUs that torch finds."""
    import torch

    return torch.cuda.device_count()
