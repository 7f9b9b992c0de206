"""A dry run finds whatever the run would refuse, with the same words; what needs no torch is found without torch.

test_bad_input.py holds most faults; here are those of what a command prepares: adapters, weights, nested values, room
on the disk, runs that are there already.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import dataflex
from dataflex.config_file import load_config
from dataflex.errors import UsageError

CHECKPOINT = "warmup/checkpoint-4"
COMMANDS = {
    "warmup": "warmup run.yaml output_dir=out",
    "train": "train run.yaml output_dir=out",
    "dynamic": "dynamic run.yaml output_dir=out",
    "grads": f"grads run.yaml --checkpoint {CHECKPOINT} -o new.h5",
    "score": f"score run.yaml --exact --checkpoint {CHECKPOINT} -o new.jsonl",
    "stores": "score --train train.h5 --eval eval.h5 -o new.jsonl",
    "select": "select run.yaml --scores scores.jsonl --count 2 -o new.jsonl",
    "merge": f"merge run.yaml --adapter {CHECKPOINT} --export-dir out",
    "bench": "bench run.yaml",
    "eval": "eval run.yaml -o new.json",
    "compare": "compare run.yaml --held-out tools -o out",
}
TRAINS = ("warmup", "train", "dynamic")
READ_ROWS = (*TRAINS, "grads", "score", "bench", "compare")
LOAD_A_MODEL = (*READ_ROWS, "merge", "eval")


def nothing() -> None:
    pass


def weights(change: Callable[[Path], object]) -> Callable[[], object]:
    """Let run.yaml name a copy of the model whose files `change` spoils."""

    def make() -> None:
        keys = yaml.safe_load(Path("run.yaml").read_text())
        base = Path(keys["model_name_or_path"])
        Path("base").mkdir()
        for path in base.iterdir():
            (Path("base") / path.name).write_bytes(path.read_bytes())
        change(Path("base"))
        Path("run.yaml").write_text(yaml.safe_dump({**keys, "model_name_or_path": "base"}))

    return make


def cut(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:-100])


def enormous(base: Path) -> None:
    """A vocabulary that no disk holds; no adapter is on it."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 10**15}))


def begun(**keys: Any) -> Callable[[], object]:
    """A finished warm-up of other settings in `out`."""
    return lambda: dataflex.warmup(load_config("run.yaml").changed(output_dir="out", **keys))


def text(path: str, content: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(content)


@dataclass(frozen=True)
class Fault:
    commands: tuple[str, ...]
    says: tuple[str, ...]
    arguments: str = ""
    spoil: Callable[[], object] = nothing
    needs_torch: bool = False


KWARGS = "lr_scheduler_type=cosine_with_min_lr lr_scheduler_kwargs="
ROOM = ("bytes", "are needed", "free; make room")

FAULTS = {
    "no data folder": Fault(READ_ROWS, ("dataset_dir gone", "dataset_info.json"), "dataset_dir=gone"),
    "unknown dataset": Fault(READ_ROWS, ("alpacca", "did you mean 'alpaca'"), "dataset=alpacca"),
    "unknown validation data": Fault(("dynamic", "score", "compare"), ("toolls",), "eval_dataset=toolls"),
    "data file missing": Fault(READ_ROWS, ("no file",), spoil=lambda: Path("data/alpaca.json").unlink()),
    "unknown template": Fault((*READ_ROWS, "merge"), ("qwenn", "did you mean 'qwen'"), "template=qwenn"),
    "base missing": Fault(LOAD_A_MODEL, ("no folder ./gone",), "model_name_or_path=./gone"),
    "base a file": Fault(LOAD_A_MODEL, ("run.yaml is a file",), "model_name_or_path=run.yaml"),
    "base without weights": Fault(
        LOAD_A_MODEL, ("base has no weights",), spoil=weights(lambda base: (base / "model.safetensors").unlink())
    ),
    "weights cut off": Fault(
        LOAD_A_MODEL, ("model.safetensors is not a whole",), spoil=weights(cut("model.safetensors"))
    ),
    "tokenizer cut off": Fault(
        LOAD_A_MODEL, ("cannot load the tokenizer",), spoil=weights(cut("tokenizer.json")), needs_torch=True
    ),
    "base's settings cut off": Fault(LOAD_A_MODEL, ("base",), spoil=weights(cut("config.json")), needs_torch=True),
    "adapter missing": Fault((*TRAINS, "eval"), ("adapter gone", "adapter_config.json"), "adapter_name_or_path=gone"),
    "an adapter to fold in missing": Fault(TRAINS, ("adapter gone",), f"adapter_name_or_path=gone,{CHECKPOINT}"),
    "checkpoint missing": Fault(("grads", "score"), ("adapter gone", "adapter_config.json"), "checkpoint=gone"),
    "merged adapter missing": Fault(("merge",), ("adapter gone",), "adapter_name_or_path=gone"),
    "no such module": Fault(TRAINS, ("nowhere",), "lora_target=nowhere", needs_torch=True),
    "no such layer": Fault(("dynamic", "grads", "score"), ("grad_layers 7",), "grad_layers=7", needs_torch=True),
    "float16": Fault(("dynamic", "grads", "score", "bench"), ("fp16", "underflow"), "fp16=true"),
    "held-out data unknown": Fault(("eval", "compare"), ("toolls",), "held_out=toolls"),
    "held-out rows that are seen": Fault(
        ("eval", "compare"), ("held-out rows stand in the training data", "--allow-overlap"), "held_out=alpaca",
        needs_torch=True,
    ),
    "a selector that is not there": Fault(("compare",), ("key 'selectors'", "'rsd'", "'rds'"), "selectors=rsd"),
    "rows drawn anew for each seed": Fault(("compare",), ("val_size", "eval_dataset"), "val_size=2 eval_dataset=null"),
    "output there": Fault(("score", "stores", "select", "eval"), ("run.yaml exists", "--overwrite"), "output=run.yaml"),
    "output_dir in use": Fault(TRAINS, ("output_dir data is not empty",), "output_dir=data"),
    "export_dir in use": Fault(("merge",), ("export_dir data is not empty",), "export_dir=data"),
    "a run of another command": Fault(
        ("train", "dynamic"), ("another run", "command (warmup then"), spoil=begun(), needs_torch=True
    ),
    "another run": Fault(("warmup",), ("another run", "lora_rank"), "lora_rank=8", begun(), needs_torch=True),
    "resumed from elsewhere": Fault(TRAINS, ("resume_from_checkpoint",), f"resume_from_checkpoint={CHECKPOINT}"),
    "store there, of other rows": Fault(
        ("grads",), ("train.h5", "cutoff_len"), "output=train.h5 cutoff_len=50", needs_torch=True
    ),
    "store there, damaged": Fault(
        ("grads",), ("train.h5", "HDF5"), "output=train.h5", text("train.h5", "row,score\n")
    ),
    "stores swapped": Fault(("stores",), ("did you swap them",), "train_stores=eval.h5 eval_stores=train.h5"),
    "store missing": Fault(("stores",), ("gone.h5", "no such file"), "train_stores=gone.h5"),
    "contrast that was not collected": Fault(("stores",), ("without contrast",), "contrast=pool"),
    "score file missing": Fault(("select",), ("gone.jsonl",), "scores=gone.jsonl"),
    "scores past the end": Fault(
        ("select",), ("row 99", "12 rows"), "count=1", text("scores.jsonl", '{"row": 99, "score": 0}')
    ),
    "schedule argument unknown": Fault(
        TRAINS, ("lr_scheduler_kwargs", "min_lr_rat", "did you mean 'min_lr_rate'"), f"{KWARGS}{{'min_lr_rat':0.1}}",
        needs_torch=True,
    ),
    "schedule argument a word": Fault(
        TRAINS, ("lr_scheduler_kwargs", "min_lr_rate 'low'"), f"{KWARGS}{{'min_lr_rate':low}}", needs_torch=True
    ),
    "a schedule without arguments": Fault(
        TRAINS, ("constant has no num_cycles", "takes no arguments"),
        "lr_scheduler_type=constant lr_scheduler_kwargs={'num_cycles':2}", needs_torch=True,
    ),
    "schedule arguments no mapping": Fault(TRAINS, ("lr_scheduler_kwargs", "dictionary"), "lr_scheduler_kwargs=3"),
    "a key of Trainer": Fault(TRAINS, ("torch_empty_cache_steps", "greater than 0"), "torch_empty_cache_steps=0"),
    "tracker missing": Fault(TRAINS, ("report_to",), "report_to=comet_ml", needs_torch=True),
    "deepspeed not JSON": Fault(
        TRAINS, ("deepspeed ds.json: not JSON",), "deepspeed=ds.json", text("ds.json", "stage: 3\n")
    ),
    "deepspeed a list": Fault(TRAINS, ("expected an object",), "deepspeed=ds.json", text("ds.json", "[3]")),
    "deepspeed of no stage": Fault(
        TRAINS, ("stage is '3'",), "deepspeed=ds.json", text("ds.json", '{"zero_optimization": {"stage": "3"}}')
    ),
    "no room for checkpoints": Fault(TRAINS, ("output_dir out", *ROOM), f"lora_rank={10**12}", needs_torch=True),
    "no room for stores": Fault(
        ("dynamic",), ("gradient stores in out", *ROOM), f"proj_dim={10**14}", needs_torch=True
    ),
    "no room for a store": Fault(("grads",), ("output new.h5", *ROOM), f"proj_dim={10**14}", needs_torch=True),
    "no room for a model": Fault(("merge",), ("export_dir out", *ROOM), spoil=weights(enormous), needs_torch=True),
}  # fmt: skip

CASES = [(name, command) for name, fault in FAULTS.items() for command in fault.commands]


def message_of(stderr: str) -> str:
    """The error, without what was said before it; a disk has another number of free bytes at any moment."""
    assert "error: " in stderr
    return re.sub(r"has \d+ bytes \([^)]*\)", "has some bytes", stderr[stderr.find("error: ") :])


@pytest.mark.parametrize(("name", "command"), CASES)
def test_the_dry_run_and_the_run_refuse_with_the_same_words(name: str, command: str, bench: Path, cli, tree) -> None:
    fault = FAULTS[name]
    fault.spoil()
    before = tree(bench)
    typed = f"{COMMANDS[command]} {fault.arguments}".split()
    planned = cli(*typed, "--dry-run")
    assert (planned.exit_code, planned.stdout) == (2, ""), planned.stderr
    for part in fault.says:
        assert part in planned.stderr
    run = cli(*typed)
    assert (run.exit_code, run.stdout) == (2, ""), run.stderr
    assert message_of(run.stderr) == message_of(planned.stderr)
    assert "Traceback" not in run.stderr and "Error:" not in message_of(run.stderr)
    assert tree(bench) == before


ALONE = """
import json, sys
from typer.testing import CliRunner
from dataflex.commands.app import app
for typed in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, typed)
    print(json.dumps([done.exit_code, "torch" in sys.modules]))
"""


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.needs_torch])
def test_what_needs_no_torch_is_found_before_torch_is_imported(name: str, bench: Path) -> None:
    fault = FAULTS[name]
    fault.spoil()
    typed = [
        [*f"{COMMANDS[command]} {fault.arguments}".split(), *dry]
        for command in fault.commands
        for dry in ([], ["--dry-run"])
    ]
    command = [sys.executable, "-c", ALONE, json.dumps(typed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[2, False]] * len(typed)


def test_a_number_that_yaml_reads_as_a_text_is_a_number(bench: Path) -> None:
    text("kwargs.yaml", Path("run.yaml").read_text() + "lr_scheduler_kwargs: {min_lr_rate: 1e-1, power: 2}\n")()
    config = load_config("kwargs.yaml")
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1, "power": 2}


def test_a_dry_run_counts_the_processes_of_the_run(bench: Path, cli) -> None:
    typed = f"{COMMANDS['dynamic']} --nproc 2 --dry-run --json".split()
    schedule = json.loads(cli(*typed).stdout)["schedule"]
    assert (schedule["rows_per_step"], schedule["rows_per_selection"]) == (4, 8)
    alone = json.loads(cli(*COMMANDS["dynamic"].split(), "--dry-run", "--json").stdout)["schedule"]
    assert alone["rows_per_step"] == 2


def test_a_deepspeed_file_that_says_otherwise_than_the_run(bench: Path, cli, tree) -> None:
    """The run would start processes, so the function that prepares it is asked, and the dry run."""
    other = {"train_batch_size": 6, "gradient_clipping": "auto", "optimizer": {"params": {"lr": 1}}}
    text("ds.json", json.dumps(other))()
    before = tree(bench)
    said = (
        r"train_batch_size is 6, and the rows of a step .* 2; optimizer.params.lr is 1, and learning_rate 0.01; write"
    )
    config = load_config("run.yaml").changed(output_dir="out", deepspeed="ds.json")
    with pytest.raises(UsageError, match=said):
        dataflex.train(config)
    planned = cli(*f"{COMMANDS['train']} deepspeed=ds.json --nproc 1 --dry-run".split())
    assert planned.exit_code == 2 and re.search(said, planned.stderr)
    assert cli(*f"{COMMANDS['train']} deepspeed=ds.json --nproc 3 learning_rate=1 --dry-run".split()).exit_code == 0
    assert tree(bench) == before
