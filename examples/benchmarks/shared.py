"""What the runners share: the inputs, the model, the clock, and the line that tells the result.

Each runner has an environment of its own, so nothing here needs more than torch until it is called.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, list[int]]
"""`input_ids` and `labels` of one row, labels −100 where unsupervised."""


@dataclass(frozen=True)
class Inputs:
    """What every program is given, beside the rows in rows.jsonl, shortest first."""

    model: str
    checkpoint: str
    """A PEFT adapter, and beside it Adam's moments by parameter name in `moments.safetensors`."""
    token_budget: int
    pad_token_id: int


def write_inputs(folder: Path, inputs: Inputs, rows: Sequence[Row]) -> None:
    (folder / "inputs.json").write_text(json.dumps(asdict(inputs), indent=2) + "\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_inputs(folder: Path) -> tuple[Inputs, list[Row]]:
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return Inputs(**json.loads((folder / "inputs.json").read_text(encoding="utf-8"))), [json.loads(row) for row in rows]


def read_vectors(folder: Path) -> dict[str, torch.Tensor]:
    """Ours, unprojected: `direction` [rows, P] of some rows, by DataFlex's formula; `gradient` [P] of the first row."""
    from safetensors.torch import load_file

    return load_file(folder / "vectors.safetensors")


def batch_of_directions(folder: Path, size: int) -> torch.Tensor:
    """[size, P]: ready-made directions, taken anew from the first where there are fewer rows."""
    directions = read_vectors(folder)["direction"]
    return directions[torch.arange(size) % len(directions)]


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of `count` of the rows, evenly over the distribution of lengths, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    count = min(count, len(order))
    return [order[round(place * (len(order) - 1) / max(1, count - 1))] for place in range(count)]


def load_model(inputs: Inputs) -> torch.nn.Module:
    """The model in float32 with the adapter to be trained on, on the CPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, inputs.checkpoint, is_trainable=True)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """In float64: five million products leave float32 too few digits."""
    one, other = one.flatten().double(), other.flatten().double()
    return float(one @ other / (one.norm() * other.norm()))


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped


def repeated(values: torch.Tensor, project: Callable[[torch.Tensor], Any], at_least: float = 2.0) -> tuple[int, Clock]:
    """Project copies of `values`, since a projector may overwrite them, until `at_least` seconds have passed.

    Returns:
        The rows projected, and the clock with their seconds.
    """
    clock, rows = Clock(), 0
    while clock.seconds.get("projection", 0.0) < at_least:
        copy = values.clone()
        with clock.part("projection"):
            project(copy)
        rows += len(values)
    return rows, clock


def report(package: str, rows: int, tokens: int, seconds: float, parts: dict[str, float], note: str) -> None:
    """Print the result as the last line of stdout, for peers.py to read."""
    result = {"program": package, "version": version(package), "torch": torch.__version__}
    result |= {"threads": torch.get_num_threads(), "rows": rows, "tokens": tokens, "seconds": seconds}
    print(json.dumps({**result, "seconds_by_part": parts, "note": note}), flush=True)
