"""run.json: what ran, on what, and where the time went."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig, save_config
from dataflex.files import write_json

LIBRARIES = ("dataflex", "torch", "transformers", "peft", "accelerate", "datasets", "h5py", "deepspeed")


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


def write_run(config: RunConfig, command: str, watch: Stopwatch, **facts: Any) -> None:
    """Write config.yaml and run.json into `output_dir`."""
    folder = Path(config.output_dir)
    save_config(config, folder / "config.yaml")
    seconds = {name: round(value, 2) for name, value in watch.seconds.items()}
    record = {"command": command, "versions": versions(), "device": device_name(), "seconds": seconds, **facts}
    write_json(folder / "run.json", record)
