"""run.json and config.yaml: what a run is, what it came from, how far it got. Written when it starts, completed when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex import processes
from dataflex.config import RunConfig, save_config
from dataflex.errors import UsageError
from dataflex.files import sha256_of, write_json

LIBRARIES = ("dataflex", "torch", "transformers", "peft", "accelerate", "datasets", "h5py", "deepspeed")
FILE_NAME = "run.json"

# Keys that say where and how to run, not what comes out.
INCIDENTAL = {
    "output_dir",
    "overwrite",
    "overwrite_output_dir",
    "overwrite_cache",
    "cache_dir",
    "components_cfg_file",
    "component_name",
    "dataset_dir",
    "do_train",
    "do_eval",
    "token_budget",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "save_only_model",
    "plot_loss",
    "report_to",
    "run_name",
    "ddp_timeout",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "deepspeed",
    "per_device_eval_batch_size",
}

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


def origin(config: RunConfig, **facts: Any) -> dict[str, Any]:
    """Everything that decides what a run comes to: its keys but the incidental ones, and `facts` about its inputs."""
    keys = {key: value for key, value in config.model_dump().items() if key not in INCIDENTAL}
    adapters = [sha256_of(Path(path) / "adapter_model.safetensors") for path in config.adapter_name_or_path or []]
    return {**keys, "rows_per_step": config.rows_per_step, "adapters": adapters, **facts}


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
    if not isinstance(facts, dict) or not isinstance(facts.get("origin"), dict):
        raise UsageError(f"{path}: not a record of a run; give --overwrite to start afresh, or another output_dir")
    return RunRecord(folder, facts)


def open_record(config: RunConfig, command: str, came_from: Mapping[str, Any]) -> RunRecord:
    """Begin a run in `output_dir`, or take up the one that was begun there.

    Raises:
        UsageError: if what was begun there is another run, naming what differs.
    """
    folder = Path(config.output_dir)
    came_from = json.loads(json.dumps({"command": command, **came_from}))  # as it reads back: tuples are lists
    fresh = config.overwrite or config.overwrite_output_dir
    record = None if fresh else read_record(folder)
    processes.barrier()  # every process has looked before the first one writes
    if record is not None:
        _check_same_run(record, came_from)
        return record
    record = RunRecord(folder, {"command": command, "finished": False, "origin": came_from})
    if processes.rank() == 0:
        for pattern in REMAINS:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    record.note(versions=versions(), device=device_name(), processes=processes.size())
    processes.barrier()
    return record


def _check_same_run(record: RunRecord, came_from: Mapping[str, Any]) -> None:
    before = record.facts["origin"]
    differing = [key for key in came_from if before.get(key) != came_from[key]]
    if differing:
        shown = [
            f"{key} ({before.get(key)} then, {came_from[key]} now)"
            if len(str(before.get(key))) + len(str(came_from[key])) <= 80
            else key
            for key in differing
        ]
        raise UsageError(
            f"output_dir {record.folder} holds another run, which differs in {', '.join(shown)}; "
            "give --overwrite to start afresh, or another output_dir"
        )
