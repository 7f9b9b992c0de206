"""Whatever a file of a model, a tokenizer, an adapter, a checkpoint, a run or dataset_info.json has become: a command
works, or ends with one sentence of its own. No exception of a library reaches the user."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from word_model import make_model

import dataflex
from dataflex.config import RunConfig
from dataflex.errors import DataflexError, UsageError
from dataflex.inspection import inspect
from dataflex.progress import Silent, SilentTask

SEEDS = 20
VALUES: list[Any] = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "a b", [], [1], ["x"], {}, {"a": 1}, [[]], [None]]
RECORDS = [{"q": f"w{i} w{i + 1}", "a": f"w{i + 2} w1", "s": "w5", "t": [f"w{i}"], "k": "x"} for i in range(4)]
TURNS = [
    {"chat": [{"who": "user", "what": f"w{i}"}, {"who": "assistant", "what": "w1 w2"}], "s": "w3"} for i in range(4)
]
INFO = {
    "qa": {"file_name": "qa.json", "columns": {"prompt": "q", "response": "a", "system": "s"}, "subset": None},
    "chat": {
        "file_name": "chat.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "system": "s"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "user", "assistant_tag": "assistant"},
    },
}


class Stopped(Exception):
    """The run has been cut off."""


class CutOff(Silent, SilentTask):
    """A Progress that ends a training after its second step."""

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str, *expected: Any) -> Iterator[CutOff]:
        self.steps, self.counts = 0, description == "training"
        yield self

    def advance(self, amount: int = 1, **shown: Any) -> None:
        self.steps += amount
        if self.counts and self.steps > 2:
            raise Stopped


class Ground:
    """What every case starts from a copy of: a model, two datasets, a finished warm-up and one that was cut off."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model", 0)
        (folder / "data").mkdir()
        for name, content in (("qa.json", RECORDS), ("chat.json", TURNS), ("dataset_info.json", INFO)):
            (folder / "data" / name).write_text(json.dumps(content))
        dataflex.warmup(self.config(folder, output_dir=folder / "done"))
        with pytest.raises(Stopped):
            dataflex.warmup(self.config(folder, output_dir=folder / "half"), CutOff())

    def config(self, folder: Path, **changes: Any) -> RunConfig:
        options = {
            "model_name_or_path": folder / "model",
            "dataset": "qa,chat",
            "dataset_dir": folder / "data",
            "cutoff_len": 32,
            "lora_rank": 1,
            "per_device_train_batch_size": 2,
            "warmup_step": 4,
            "save_steps": 1,
            "proj_dim": 32,
            **changes,
        }
        paths = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        return dataflex.load_config(options=paths)


COMMANDS: dict[str, Callable[[Ground, Path], object]] = {
    "grads": lambda ground, folder: dataflex.grads(
        ground.config(folder, checkpoint=folder / "done/checkpoint-4", output=folder / "new.h5")
    ),
    "merge": lambda ground, folder: dataflex.merge(
        ground.config(folder, adapter_name_or_path=folder / "done/checkpoint-4", export_dir=folder / "new")
    ),
    "train": lambda ground, folder: dataflex.train(
        ground.config(folder, adapter_name_or_path=folder / "done/checkpoint-4", output_dir=folder / "new", max_steps=1)
    ),
    "resume": lambda ground, folder: dataflex.warmup(ground.config(folder, output_dir=folder / "half")),
    "inspect": lambda ground, folder: inspect(folder / "half", ground.config(folder)),
}
MODEL = ("grads", "merge", "train")
ADAPTER = ("grads", "merge", "train")
RESUME = ("resume", "inspect")
FILES: dict[str, tuple[str, ...]] = {
    "model/config.json": MODEL,
    "model/generation_config.json": ("merge",),
    "model/model.safetensors": MODEL,
    "model/tokenizer.json": MODEL,
    "model/tokenizer_config.json": MODEL,
    "model/chat_template.jinja": MODEL,
    "data/dataset_info.json": ("train",),
    "done/checkpoint-4/adapter_config.json": ADAPTER,
    "done/checkpoint-4/adapter_model.safetensors": ADAPTER,
    "done/checkpoint-4/moments.safetensors": ("grads",),
    "half/run.json": RESUME,
    "half/config.yaml": RESUME,
    "half/checkpoint-2/trainer_state.json": RESUME,
    "half/checkpoint-2/optimizer.pt": RESUME,
    "half/checkpoint-2/scheduler.pt": RESUME,
    "half/checkpoint-2/rng_state.pth": RESUME,
    "half/checkpoint-2/adapter_config.json": RESUME,
    "half/checkpoint-2/adapter_model.safetensors": RESUME,
    "half/checkpoint-2/moments.safetensors": RESUME,
}


def spoil(path: Path, chance: random.Random) -> str:
    """Change a file in one of the ways that its kind allows; what was done, in words."""
    kinds = [damage]
    if path.suffix == ".json":
        kinds += [change_json] * 3
    if path.suffix == ".safetensors":
        kinds += [change_tensors] * 2
    if path.suffix == ".jinja":
        kinds += [change_template] * 2
    return chance.choice(kinds)(path, chance)


def damage(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    how = chance.choice(["removed", "emptied", "cut", "random bytes", "one byte", "a folder"])
    if how in ("removed", "a folder"):
        path.unlink()
        if how == "a folder":
            path.mkdir()
        return how
    offset = chance.randrange(max(1, len(data)))
    changed = {
        "emptied": b"",
        "cut": data[:offset],
        "random bytes": chance.randbytes(200),
        "one byte": data[:offset] + bytes([chance.randrange(256)]) + data[offset + 1 :],
    }
    path.write_bytes(changed[how])
    return f"{how} at {offset}"


def change_json(path: Path, chance: random.Random) -> str:
    """Put another value somewhere, or take a key away."""
    value = json.loads(path.read_text())
    holders: list[Any] = [value]
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        holders += [item for item in inner if isinstance(item, (dict, list)) and item]
    depth = min(len(holders), 6) if chance.random() < 0.7 else len(holders)  # the outer keys decide most
    holder = chance.choice(holders[:depth])
    key = chance.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    other = chance.choice(VALUES)
    if isinstance(holder, dict) and chance.random() < 0.15:
        del holder[key]
        other = "removed"
    else:
        holder[key] = other
    path.write_text(json.dumps(value))
    return f"{key} is {other!r}"


def change_tensors(path: Path, chance: random.Random) -> str:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    name = chance.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = chance.choice(["gone", "renamed", "integers", "wider", "flat", "empty", "not finite", "half", "metadata"])
    made = {
        "renamed": {f"x.{name}": tensor},
        "integers": {name: tensor.long()},
        "wider": {name: torch.cat([tensor, tensor])},
        "flat": {name: tensor.flatten().contiguous()},
        "empty": {name: tensor[:0].clone()},
        "not finite": {name: torch.full_like(tensor, float("nan"))},
        "half": {name: tensor.half()},
        "metadata": {name: tensor},
    }
    if how == "metadata":
        metadata = {key: chance.choice(["", "x", "-1", "nan", text]) for key, text in metadata.items()}
    save_file({**tensors, **made.get(how, {})}, path, metadata=metadata)
    return f"{name} {how}"


def change_template(path: Path, chance: random.Random) -> str:
    text = path.read_text()
    changed = chance.choice(
        [
            "{% for",
            "{{ messages.x.y }}",
            "{{ 1/0 }}",
            "{{ raise_exception('no') }}",
            text + "{{ x(1) }}",
            text[:40],
            "a",
        ]
    )
    path.write_text(changed)
    return changed


RAW = re.compile(
    r"\b[A-Z]\w*[a-z](Error|Exception|Warning)\b|Traceback|_rust|<class |object at 0x|not supported between"
)


def complaint(error: BaseException, path: Path) -> str | None:
    """What is wrong with the way a command ended; None where nothing is."""
    text = str(error)
    if not isinstance(error, DataflexError):
        return f"{type(error).__name__}: {text[:200]}"
    if RAW.search(text):
        return f"raw words in {text!r}"
    if text.rstrip().endswith((":", "(", ",")) or not text.strip():
        return f"cut off: {text!r}"
    if not any(name in text for name in (path.name, path.parent.name, path.stem.replace("_", " "), "adapter at")):
        return f"does not name {path.name}: {text!r}"
    return None


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_file(ground: Ground, tmp_path: Path, name: str, seed: int) -> None:
    chance = random.Random(f"{name} {seed}")
    folder = tmp_path / "case"
    shutil.copytree(ground.folder, folder)
    done = spoil(folder / name, chance)
    command = chance.choice(FILES[name])
    before = {path for path in folder.rglob("*") if path.is_file()}
    try:
        COMMANDS[command](ground, folder)
    except Exception as error:
        wrong = complaint(error, folder / name)
        assert wrong is None, f"{command} with {name}: {done}: {wrong}"
        if isinstance(error, UsageError):
            new = {path for path in folder.rglob("*") if path.is_file()} - before
            assert not [path for path in new if path.name != ".lock"], f"{command} with {name}: {done}: wrote {new}"
