"""Benchmark tasks of the package lm-eval on the model that `eval` measures: its command, and its results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig, needed
from dataflex.environment import without_launcher
from dataflex.errors import DataflexError, UsageError
from dataflex.progress import SILENT, Progress


def lm_eval_command(config: RunConfig) -> list[str]:
    """The command line that measures the model of `config` on its `tasks`."""
    dtype = "bfloat16" if config.bf16 or config.pure_bf16 else "float16" if config.fp16 else "float32"
    model = {"pretrained": needed(config.model_name_or_path), "dtype": dtype}
    if config.resumed_adapter:
        model["peft"] = config.resumed_adapter
    if config.model_revision:
        model["revision"] = config.model_revision
    if config.trust_remote_code:
        model["trust_remote_code"] = "True"
    return [
        *("lm_eval", "--model", "hf", "--model_args", ",".join(f"{key}={value}" for key, value in model.items())),
        *("--tasks", ",".join(needed(config.tasks)), "--batch_size", str(config.per_device_eval_batch_size)),
    ]


def check_tasks(config: RunConfig) -> None:
    """Raise a UsageError where lm-eval could not load the model as `eval` does."""
    if not config.tasks:
        raise UsageError("export lm-eval needs tasks: names of lm-eval's tasks, by comma")
    if needed(config.model_name_or_path).endswith(".gguf"):
        raise UsageError("export lm-eval: lm-eval loads no .gguf file; name the folder that `dataflex merge` writes")
    if len(config.adapter_name_or_path or []) > 1 or config.quantization_bit:
        raise UsageError(
            "export lm-eval takes one adapter on a model that is not quantized; merge them first, and name the folder"
        )


def run_tasks(config: RunConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """The command, and by task lm-eval's own metrics; `tasks` is null where lm-eval is not installed.

    Raises:
        DataflexError: lm-eval failed; what it printed says why.
    """
    command = lm_eval_command(config)
    if find_spec("lm_eval") is None:
        progress.say(f"lm-eval is not installed; pip install 'lm-eval[hf]', then: {shlex.join(command)}")
        return {"command": shlex.join(command), "tasks": None}
    progress.say(f"running {shlex.join(command)}")
    with tempfile.TemporaryDirectory() as folder, progress.task("lm-eval", 1, "runs") as task:
        arguments = [sys.executable, "-m", *command, "--output_path", folder]
        done = subprocess.run(arguments, env=without_launcher(), stdout=sys.stderr, check=False)
        task.advance(1)  # an interruption that lm-eval was ended by is told here
        if done.returncode != 0:
            raise DataflexError(f"lm-eval ended with exit code {done.returncode}; its own message stands above")
        results = json.loads(next(Path(folder).rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    return {"command": shlex.join(command), "tasks": results}


def metrics_of(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """A line for each task and metric of `run_tasks`: lm-eval names a metric with its filter, as `acc,none`."""
    return [
        (task, metric.removesuffix(",none"), value)
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if "," in metric
    ]
