"""run.json and config.yaml: what a run is, what it came from, how far it got.

Written when the run starts, completed when it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex import processes
from dataflex.config import RunConfig, needed, save_config
from dataflex.distribution import own_version
from dataflex.errors import UsageError
from dataflex.files import write_json
from dataflex.locks import Lock
from dataflex.origin import Origin

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "h5py", "deepspeed")
FILE_NAME = "run.json"
LOCK_NAME = ".lock"
CONFIG_NAME = "config.yaml"

# What a former run leaves in its folder and a fresh start must not find. The record goes first: a kill after it leaves
# no finished run without its checkpoints.
REMAINS = (FILE_NAME, "checkpoint-*", "selections", "gradients", "trainer_log.jsonl")


def versions() -> dict[str, str]:
    """Versions of the libraries on which the results of a run may depend."""
    found = {"python": platform.python_version(), "dataflex": own_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name() -> str:
    """The name of the GPU, or of the processor with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


class Stopwatch:
    """Seconds by phase. A phase inside another stops the outer one's clock meanwhile, so that each second counts
    once."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """`seconds` of an earlier part of the work count as well."""
        self.seconds = dict(seconds or {})
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class RunRecord:
    """The run.json of an output directory. Rank 0 writes it; every process may read it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts

    @property
    def finished(self) -> bool:
        return bool(self.facts.get("finished"))

    def note(self, **facts: Any) -> None:
        """Add facts and write the record; atomic."""
        self.facts.update(facts)
        if processes.rank() == 0:
            write_json(self.folder / FILE_NAME, self.facts)


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
        if facts.get("prompt_date") is not None:
            datetime.date.fromisoformat(facts["prompt_date"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: not a record of a run that this version wrote; give --overwrite to start afresh, or another "
            "output_dir"
        ) from None
    return RunRecord(folder, facts)


def was_begun(folder: Path) -> bool:
    """Whether a run has begun in `folder`, also one that was killed before its run.json was there."""
    if (folder / FILE_NAME).is_file():
        return True
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # files.atomic writes under such a temporary name, which a kill leaves behind
    others = [name for name in names - {LOCK_NAME, CONFIG_NAME} if not re.fullmatch(r"\..+\.tmp", name)]
    return LOCK_NAME in names and not others


def lock(folder: Path) -> Lock:
    """Keep any other run out of `folder` until the lock is closed.

    Raises:
        UsageError: if another run is in it now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Lock(folder / LOCK_NAME)
    except BlockingIOError:
        raise UsageError(f"output_dir {folder}: another run is writing there; wait for it, or name another") from None


def find_record(config: RunConfig, came_from: Origin) -> RunRecord | None:
    """The record of the run that was begun in `output_dir`, None for a fresh start. Writes nothing.

    Raises:
        UsageError: if what was begun there is another run, naming what differs.
    """
    if config.overwrite or config.overwrite_output_dir:
        return None
    record = read_record(Path(needed(config.output_dir)))
    if record is not None:
        _check_same_run(record, came_from)
    return record


@contextlib.contextmanager
def open_record(config: RunConfig, came_from: Origin, remains: Sequence[str] = REMAINS) -> Iterator[RunRecord]:
    """Begin a run in `output_dir`, or take up the one that was begun there. Every process calls this.

    Other runs are kept out of the folder until the block ends. A fresh start removes the patterns `remains`.
    """
    folder = Path(needed(config.output_dir))
    with lock(folder) if processes.rank() == 0 else contextlib.nullcontext():
        record = find_record(config, came_from)
        processes.barrier()  # every process has looked before the first one writes
        if record is None:
            record = RunRecord(folder, {"command": came_from.command, "finished": False, "origin": came_from.as_json()})
            if processes.rank() == 0:
                for pattern in remains:
                    for path in folder.glob(pattern):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                save_config(config, folder / CONFIG_NAME, resolved=came_from.command != "compare")
            record.note(
                versions=versions(),
                device=device_name(),
                processes=processes.size(),
                prompt_date=str(config.prompt_date) if config.prompt_date else None,
            )
            processes.barrier()
        yield record


def _check_same_run(record: RunRecord, came_from: Origin) -> None:
    differing = Origin.from_json(record.facts["origin"]).differences(came_from)
    if differing:
        raise UsageError(
            f"output_dir {record.folder} holds another run, which differs in {', '.join(differing)}; "
            "give --overwrite to start afresh, or another output_dir"
        )
