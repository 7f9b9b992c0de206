"""run.json and config.yaml: what a run is, what it came from, how far it got.

Written when the run starts, completed when it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex import processes
from dataflex.config import RunConfig, save_config
from dataflex.errors import UsageError
from dataflex.files import write_json
from dataflex.origin import Origin

LIBRARIES = ("dataflex", "torch", "transformers", "peft", "accelerate", "datasets", "h5py", "deepspeed")
FILE_NAME = "run.json"
LOCK_NAME = ".lock"

# What a former run leaves in its folder and a fresh start must not find.
REMAINS = ("checkpoint-*", "selections", "gradients", "trainer_log.jsonl", FILE_NAME)


def versions() -> dict[str, str]:
    """Versions of the libraries a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name() -> str:
    """The GPU's name, or the processor's with its core count."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class RunRecord:
    """The run.json of an output directory. Rank 0 writes it; every process may read it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.locked: Lock | None = None

    @property
    def finished(self) -> bool:
        return bool(self.facts.get("finished"))

    def note(self, **facts: Any) -> None:
        """Add facts and write the record; atomic."""
        self.facts.update(facts)
        if processes.rank() == 0:
            write_json(self.folder / FILE_NAME, self.facts)
        if self.finished and self.locked is not None:
            self.locked.close()


def read_record(folder: Path) -> RunRecord | None:
    """The record in `folder`, or None where no run has begun there.

    Raises:
        UsageError: if there is one that cannot be read.
    """
    path = folder / FILE_NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable ({error}); give --overwrite to start afresh") from None
    try:
        Origin.from_json(facts["origin"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: not a record of a run that this version wrote; give --overwrite to start afresh, or another "
            "output_dir"
        ) from None
    return RunRecord(folder, facts)


class Lock:
    """A file held open under a lock; released by `close`, or with the last reference to it."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    __del__ = close


def lock(folder: Path) -> Lock:
    """Keep any other run out of `folder` until the lock is closed.

    Raises:
        UsageError: if another run is in it now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UsageError(f"output_dir {folder}: another run is writing there; wait for it, or name another") from None
    return Lock(handle)


def find_record(config: RunConfig, came_from: Origin) -> RunRecord | None:
    """The record of the run that was begun in `output_dir`, None for a fresh start. Writes nothing.

    Raises:
        UsageError: if what was begun there is another run, naming what differs.
    """
    if config.overwrite or config.overwrite_output_dir:
        return None
    record = read_record(Path(config.output_dir))
    if record is not None:
        _check_same_run(record, came_from)
    return record


def open_record(config: RunConfig, came_from: Origin) -> RunRecord:
    """Begin a run in `output_dir`, or take up the one that was begun there. Every process calls this."""
    folder = Path(config.output_dir)
    locked = lock(folder) if processes.rank() == 0 else None
    record = find_record(config, came_from)
    processes.barrier()  # every process has looked before the first one writes
    if record is None:
        record = RunRecord(folder, {"command": came_from.command, "finished": False, "origin": came_from.as_json()})
        if processes.rank() == 0:
            for pattern in REMAINS:
                for path in folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            save_config(config, folder / "config.yaml")
        record.note(
            versions=versions(), device=device_name(), processes=processes.size(), prompt_date=str(config.prompt_date)
        )
        processes.barrier()
    record.locked = locked
    return record


def _check_same_run(record: RunRecord, came_from: Origin) -> None:
    differing = Origin.from_json(record.facts["origin"]).differences(came_from)
    if differing:
        raise UsageError(
            f"output_dir {record.folder} holds another run, which differs in {', '.join(differing)}; "
            "give --overwrite to start afresh, or another output_dir"
        )
