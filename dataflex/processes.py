"""The processes of a run: rank and size, and the collective operations that dataflex uses.

Every operation also works in a single process, so callers are written once. `environment` counts the processes.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dataflex.environment import launched, local_rank, world_size
from dataflex.environment import rank as rank
from dataflex.errors import UsageError
from dataflex.progress import Interrupted, Task

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

size = world_size
"""How many processes there are."""

LONGEST_WAIT = datetime.timedelta(days=1)
"""For a process that works while the others wait. A process that dies ends the others' wait at once."""

_waiting: Any = None  # the group of all processes in which one may work alone for up to LONGEST_WAIT


def join(timeout_s: int = 1800, deepspeed: bool = False) -> None:
    """Join the other processes, once. A single process without DeepSpeed has nothing to do.

    Args:
        timeout_s: how long training waits for a process that hangs. The functions below wait longer: the first process
            tokenizes, hashes and writes files while the others wait.

    Raises:
        UsageError: if DeepSpeed is asked for in a process that no launcher started.
    """
    if _team() is not None or (size() == 1 and not deepspeed):
        return
    if not launched():
        raise UsageError("deepspeed runs in processes that a launcher starts: use the command line, or torchrun")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    # a timedelta cannot hold what some YAMLs ask for
    timeout = datetime.timedelta(seconds=min(timeout_s, LONGEST_WAIT.total_seconds()))
    dist.init_process_group(backend, timeout=timeout)
    global _waiting
    _waiting = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    if deepspeed:  # it keeps a view of its own of the group, and needs it before ZeRO-3 loads a model
        from deepspeed import comm, ops

        # An extension for inference on processors, which training never calls. Each process would compile it or wait
        # for a lock file, and wait forever for one that a killed process has left.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        comm.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


def leave() -> None:
    """Leave the other processes at the end of a command."""
    global _waiting
    if (dist := _team()) is not None:
        dist.destroy_process_group()
        _waiting = None


def _team() -> Any:
    """torch.distributed where this process has joined others, else None. A process without torch has joined none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def barrier() -> None:
    """Wait until every process calls this function."""
    if (dist := _team()) is not None:
        dist.barrier(_waiting)


def gather(value: T) -> list[T]:
    """Every process's `value`, in order of rank, on rank 0; an empty list on the others."""
    if (dist := _team()) is None:
        return [value]
    values: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(value, values, group=_waiting)
    return values or []


def broadcast(value: T) -> T:
    """The `value` of rank 0, in every process."""
    if (dist := _team()) is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_waiting)
    return box[0]


def sum_over(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place."""
    if (dist := _team()) is not None:
        barrier()  # the sum itself waits no longer than training does
        for tensor in tensors:
            dist.all_reduce(tensor)


def advance(task: Task, amount: int = 1, **shown: Any) -> None:
    """Advance the `task` of each process. An interruption of one process interrupts all of them at the same step.

    Raises:
        Interrupted: in every process, if any of them is to end here.
    """
    stop = None
    try:
        task.advance(amount, **shown)
    except Interrupted as interrupted:
        stop = interrupted
    if (dist := _team()) is not None:
        import torch

        exit_code = torch.tensor(stop.exit_code if stop else 0)
        dist.all_reduce(exit_code, dist.ReduceOp.MAX, group=_waiting)
        if exit_code:
            stop = Interrupted(int(exit_code))
    if stop is not None:
        raise stop


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that all processes see, made for the block and removed after it. Collective."""
    with contextlib.ExitStack() as stack:
        name = ""
        if rank() == 0:
            parent.mkdir(parents=True, exist_ok=True)
            name = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".scoring."))
        yield Path(broadcast(name))
        barrier()


def my_turns(items: Sequence[T]) -> list[T | None]:
    """This process's share of `items`, one a turn, every process with as many turns; None where items run out.

    Items in order of size stay balanced: in each turn the processes hold neighbours.
    """
    turns = -(-len(items) // size())
    indices = [turn * size() + rank() for turn in range(turns)]
    return [items[index] if index < len(items) else None for index in indices]
