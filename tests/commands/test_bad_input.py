"""What users get wrong: exit code 2, one message that names the culprit and the way out, nothing written."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dataflex
from dataflex.config_file import load_config
from dataflex.errors import UsageError
from dataflex.files import check_output_dir, check_output_file
from dataflex.influence.score_file import read_scores
from dataflex.influence.scores import Scores

CHECKPOINT = "warmup/checkpoint-4"
TRAIN = "train run.yaml output_dir=out"
DYNAMIC = "dynamic run.yaml output_dir=out"
GRADS = f"grads run.yaml --checkpoint {CHECKPOINT} -o new.h5"
SCORE = "score --train train.h5 --eval eval.h5 -o new.jsonl"
SELECT = "select run.yaml --scores scores.jsonl -o new.jsonl"
MERGE = f"merge run.yaml --adapter {CHECKPOINT} --export-dir out"


def text(path: str, content: str | bytes) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[: -Path(path).stat().st_size // 2])


def rows(records: object) -> Callable[[], object]:
    return text("data/alpaca.json", json.dumps(records))


def adapter(
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, value: value, **renamed: str
) -> Callable[[], object]:
    """Rewrite the checkpoint's adapter: every tensor changed, parts of names replaced."""
    path = f"{CHECKPOINT}/adapter_model.safetensors"

    def make() -> None:
        tensors = {name: change(name, value) for name, value in load_file(path).items()}
        for old, new in renamed.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(tensors, path)

    return make


def wider(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.repeat(2, 2).contiguous()


def not_whole() -> None:
    with h5py.File("train.h5", "r+") as file:
        file["done"][3] = 0


def other_store(**changes: object) -> Callable[[], object]:
    def make() -> None:
        config = load_config("run.yaml").changed(checkpoint=[CHECKPOINT], output="eval.h5", split="eval")
        dataflex.grads(config.changed(overwrite=True, **changes))

    return make


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """What is typed, what is wrong beforehand, and what the message must say."""

    command: str
    says: tuple[str, ...]
    spoil: Callable[[], object] = nothing
    code: int = 2


BAD_CONFIG = {
    "config missing": Case("train gone.yaml", ("gone.yaml", "No such file")),
    "config malformed": Case(
        TRAIN, ("run.yaml, line 2", "not valid YAML"), text("run.yaml", "lora_rank: 4\n\tseed: 1\n")
    ),
    "config is a directory": Case("train data", ("config data", "directory")),
    "config is a list": Case(TRAIN, ("run.yaml", "key: value"), text("run.yaml", "- a\n")),
    "config is binary": Case(TRAIN, ("run.yaml", "not UTF-8"), text("run.yaml", b"\x89HDF\xff\x00")),
    "two configs": Case(f"{TRAIN} other.yaml", ("run.yaml, other.yaml", "key=value")),
    "no config": Case("grads", ("model_name_or_path", "dataset", "checkpoint", "output", "set it in the YAML")),
    "unknown key": Case(f"{TRAIN} learning_rat=1", ("learning_rat", "did you mean 'learning_rate'")),
    "unknown value": Case(f"{TRAIN} --gradient-type adan", ("--gradient-type",)),
    "unknown value of a key": Case(f"{DYNAMIC} reduce=sum", ("reduce", "'mean', 'max', 'round-robin' or 'rows'")),
    "unknown option": Case("score --trian x.h5", ("--trian",)),
    "unknown template": Case(f"{TRAIN} --template qwenn", ("qwenn", "did you mean 'qwen'")),
    "unknown component": Case(f"{DYNAMIC} component_name=lees", ("lees", "less, random")),
    "components malformed": Case(
        f"{DYNAMIC} components_cfg_file=parts.yaml", ("parts.yaml, line 1",), text("parts.yaml", "{")
    ),
    "unknown schedule": Case(f"{TRAIN} lr_scheduler_type=cosin", ("lr_scheduler_type", "'cosine'", "'cosin'")),
    "negative number": Case(f"{TRAIN} --cutoff-len -5", ("cutoff_len", "greater than 0", "-5")),
    "a word for a number": Case(f"{TRAIN} lora_rank=many", ("lora_rank", "integer", "many")),
    "keys at odds": Case(f"{TRAIN} bf16=true fp16=true", ("bf16 and fp16", "keep one")),
    "deepspeed file missing": Case(f"{TRAIN} deepspeed=zero3.json", ("deepspeed", "zero3.json")),
    "all problems at once": Case(f"{TRAIN} lora_rank=0 learning_rat=1 fp16=1 bf16=1", ("3 problems", "lora_rank")),
}

BAD_MODEL = {
    "model directory without config": Case(f"{TRAIN} --model data", ("data has no config.json", "whole model")),
    "model unknown": Case(f"{TRAIN} --model nobody/nothing", ("nobody/nothing", "local folder")),
    "gguf missing": Case(f"{TRAIN} --model gone.gguf", ("gone.gguf", "no file")),
}

BAD_DATA = {
    "dataset unknown": Case(f"{TRAIN} --dataset alpacca", ("alpacca", "did you mean 'alpaca'")),
    "dataset_dir missing": Case(f"{TRAIN} --dataset-dir dada", ("dataset_dir dada", "dataset_info.json")),
    "dataset_info malformed": Case(TRAIN, ("dataset_info.json", "not valid JSON"), text("data/dataset_info.json", "{")),
    "dataset_info a list": Case(TRAIN, ("dataset_info.json", "object"), text("data/dataset_info.json", "[]")),
    "data file missing": Case(TRAIN, ("alpaca.json", "no file"), lambda: Path("data/alpaca.json").unlink()),
    "data path missing": Case(f"{TRAIN} --dataset gone.jsonl", ("gone.jsonl", "no such file")),
    "data file empty": Case(TRAIN, ("alpaca.json",), text("data/alpaca.json", "")),
    "jsonl empty": Case(f"{TRAIN} --dataset e.jsonl", ("e.jsonl", "it is empty"), text("e.jsonl", "")),
    "data not JSON": Case(TRAIN, ("alpaca.json", "JSON"), text("data/alpaca.json", "instruction,output\n")),
    "jsonl line not JSON": Case(
        f"{TRAIN} --dataset e.jsonl", ("e.jsonl, line 2",), text("e.jsonl", '{"instruction": "a", "output": "b"}\n{\n')
    ),
    "row not an object": Case(TRAIN, ("alpaca.json, row 1", "object"), rows([{"instruction": "a", "output": "b"}, 3])),
    "no row with a response": Case(
        f"{TRAIN} --dataset alpaca", ("none of 2 rows", "row 0", "response"),
        rows([{"instruction": "a"}, {"instruction": "b", "input": "c"}]),
    ),
    "nothing supervised": Case(f"{TRAIN} --cutoff-len 1", ("rows can be used",)),
    "unknown fields": Case(f"{TRAIN} --dataset e.jsonl", ("e.jsonl", "dataset_info.json"), text("e.jsonl", '{"q": 1}')),
    "selection larger than the data": Case(f"{DYNAMIC} update_step=50", ("100 rows", "has 12", "lower update_step")),
    "eval data not named": Case(f"{DYNAMIC} eval_dataset=null", ("dynamic needs eval_dataset",)),
    "steps that are none": Case(f"{DYNAMIC} warmup_step=0 update_times=0", ("no steps", "raise one")),
}  # fmt: skip

BAD_OUTPUT = {
    "output_dir is a file": Case("train run.yaml output_dir=run.yaml", ("run.yaml is not a folder", "another")),
    "output_dir below a file": Case("warmup run.yaml output_dir=run.yaml/a/b", ("run.yaml is not a folder",)),
    "output_dir in use": Case(
        "train run.yaml output_dir=warmup", ("output_dir warmup", "--overwrite", "another output_dir")
    ),
    "dynamic's output_dir is a file": Case("dynamic run.yaml output_dir=run.yaml", ("not a folder",)),
    "store is a directory": Case(f"grads run.yaml --checkpoint {CHECKPOINT} -o data", ("data is a folder",)),
    "store below a file": Case(f"grads run.yaml --checkpoint {CHECKPOINT} -o run.yaml/x.h5", ("not a folder",)),
    "scores there already": Case(SCORE.replace("new", "scores"), ("scores.jsonl exists", "--overwrite")),
    "subset there already": Case(f"{SELECT} --count 2 -o run.yaml", ("run.yaml exists", "--overwrite")),
    "subset is a directory": Case(f"{SELECT} --count 2 -o data", ("data is a folder",)),
    "export_dir is a file": Case(f"{MERGE} export_dir=run.yaml", ("run.yaml is not a folder",)),
    "export_dir in use": Case(f"{MERGE} export_dir=data", ("data is not empty", "--overwrite")),
    "export_dir holds other things": Case(
        f"{MERGE} export_dir=data --overwrite", ("alpaca.json", "no part of an earlier export", "another")
    ),
    "export_dir is the adapter": Case(f"{MERGE} export_dir={CHECKPOINT} --overwrite", ("lies there", "another")),
    "export_dir is above the adapter": Case(f"{MERGE} export_dir=. --overwrite", ("lies there", "another")),
}

BAD_CHECKPOINT = {
    "checkpoint missing": Case(GRADS.replace("-4", "-9"), ("checkpoint-9", "adapter_config.json")),
    "several checkpoints": Case(f"{GRADS} --checkpoint warmup/checkpoint-2", ("one checkpoint", "a store for each")),
    "no moments": Case(
        GRADS, ("moments.safetensors", "sgd"), lambda: Path(f"{CHECKPOINT}/moments.safetensors").unlink()
    ),
    "moments cut off": Case(GRADS, ("moments.safetensors", "broken"), cut(f"{CHECKPOINT}/moments.safetensors")),
    "adapter cut off": Case(GRADS, ("adapter_model.safetensors",), cut(f"{CHECKPOINT}/adapter_model.safetensors")),
    "adapter of a wider model": Case(
        GRADS, ("does not fit", "lora_A", "256", "128"), adapter(wider)
    ),
    "adapter of another architecture": Case(
        MERGE, ("does not fit", "w_proj", "the model lacks"),
        adapter(q_proj="w_proj"),
    ),
    "merging an adapter of a wider model": Case(
        MERGE, ("does not fit", "lora_A", "256", "128"), adapter(wider)
    ),
    "merging an untrained adapter": Case(
        MERGE, ("changes nothing", "was it trained"),
        adapter(lambda name, value: value * 0 if "lora_B" in name else value), code=1,
    ),
    "store of another run": Case(f"{GRADS} -o train.h5 proj_seed=5", ("train.h5", "proj_seed", "--overwrite")),
    "store of nothing": Case(f"{GRADS} proj_dim=null", ("proj_dim null", "--exact")),
}  # fmt: skip

BAD_SCORES = {
    "scores missing": Case(f"{SELECT} --scores gone.jsonl --count 2", ("gone.jsonl", "No such file")),
    "scores empty": Case(f"{SELECT} --count 2", ("scores.jsonl", "no scores"), text("scores.jsonl", "\n")),
    "scores malformed": Case(f"{SELECT} --count 2", ("line 1", "JSON"), text("scores.jsonl", "row 1\n")),
    "scores without a score": Case(f"{SELECT} --count 1", ("record 1", "expected"), text("scores.jsonl", '{"row": 1}')),
    "scores not finite": Case(
        f"{SELECT} --count 1", ("record 1", "expected"), text("scores.jsonl", '{"row": 1, "score": NaN}')
    ),
    "row twice": Case(
        f"{SELECT} --count 1", ("row 1 stands twice",), text("scores.jsonl", '{"row": 1, "score": 0}\n' * 2)
    ),
    "row beyond the data": Case(
        f"{SELECT} --count 1", ("row 99", "12 rows", "name the data"), text("scores.jsonl", '{"row": 99, "score": 0}')
    ),
    "count beyond the scores": Case(f"{SELECT} --count 13", ("13", "12 scored rows", "lower it")),
    "count 0": Case(f"{SELECT} --count 0", ("count", "greater than 0")),
    "top 2": Case(f"{SELECT} --top 2", ("top", "less than or equal to 1")),
    "top negative": Case(f"{SELECT} --top -0.1", ("top", "greater than 0")),
    "threshold nobody reaches": Case(f"{SELECT} --threshold 9", ("no row scores 9", "the best")),
    "no rule": Case(SELECT, ("top", "count", "threshold")),
    "two rules": Case(f"{SELECT} --top 0.5 --count 3", ("top, count and threshold", "keep one")),
    "stores missing": Case("score -o new.jsonl", ("train_stores, eval_stores",)),
    "store missing": Case(SCORE.replace("train.h5", "gone.h5"), ("gone.h5", "no such file", "dataflex grads")),
    "store cut off": Case(SCORE, ("train.h5",), cut("train.h5")),
    "store not HDF5": Case(SCORE, ("train.h5", "HDF5"), text("train.h5", "row,score\n")),
    "another HDF5 file": Case(SCORE, ("train.h5", "not a gradient store"), lambda: h5py.File("train.h5", "w").close()),
    "store not whole": Case(SCORE, ("train.h5", "1 of 12 rows", "first: row 3", "again"), not_whole),
    "stores of other seeds": Case(SCORE, ("proj_seed (123 against 7)",), other_store(proj_seed=7)),
    "stores of other widths": Case(SCORE, ("proj_dim (256 against 128)",), other_store(proj_dim=128)),
    "stores of other checkpoints": Case(SCORE, ("adapter",), other_store(checkpoint=["warmup/checkpoint-2"])),
    "unpaired stores": Case(f"{SCORE} --train train.h5", ("2 training stores and 1 validation",)),
    "weights are words": Case(f"{SCORE} --weights many", ("many", "lr, uniform")),
    "weights too many": Case(f"{SCORE} --weights 0.5,0.5", ("2 numbers for 1 checkpoints",)),
    "weights negative": Case(f"{SCORE} --weights=-1", ("at least 0",)),
    "weights all zero": Case(f"{SCORE} --weights 0", ("not all 0",)),
    "exact and stores": Case(f"{SCORE} --exact", ("exact", "no stores")),
    "exact without checkpoint": Case("score run.yaml --exact -o new.jsonl", ("score --exact needs checkpoint",)),
}

ONLY_THE_RUN = {"model unknown"}  # a dry run does not ask the hub

CASES = {**BAD_CONFIG, **BAD_MODEL, **BAD_DATA, **BAD_OUTPUT, **BAD_CHECKPOINT, **BAD_SCORES}


def message_of(stderr: str) -> str:
    """The error, without what was said before it."""
    return stderr[stderr.find("error: ") :]


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, bench: Path, cli, tree):
    case = CASES[name]
    case.spoil()
    before = tree(bench)
    result = cli(*case.command.split())
    assert result.exit_code == case.code, result.stderr
    said = " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())  # the words alone, however they were laid out
    for part in case.says:
        assert part in said
    assert "Traceback" not in result.stderr
    assert "Error:" not in result.stderr.split("error: ", 1)[-1]  # a message of ours, not an exception's name
    assert result.stdout == ""
    assert tree(bench) == before
    if case.code == 2 and name not in ONLY_THE_RUN:
        planned = cli(*case.command.split(), "--dry-run")
        assert (planned.exit_code, planned.stdout) == (2, "")
        assert message_of(planned.stderr) == message_of(result.stderr)
        assert tree(bench) == before


@pytest.mark.parametrize("name", ["config missing", "unknown key", "no row with a response", "store cut off"])
def test_bad_input_in_a_process_of_its_own(name: str, bench: Path, run_cli, tree):
    case = CASES[name]
    case.spoil()
    before = tree(bench)
    done = run_cli(*case.command.split(), cwd=bench, check=False)
    assert (done.returncode, done.stdout) == (case.code, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(part in done.stderr for part in case.says)
    assert tree(bench) == before


def test_debugging_shows_the_traceback(bench: Path, run_cli):
    done = run_cli("train", "gone.yaml", cwd=bench, env={"DATAFLEX_DEBUG": "1"}, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "gone.yaml" in done.stderr


def test_a_folder_without_permission():
    """Checked as another user where this one may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 0)
        try:
            for check in (
                lambda path: check_output_dir(path, "output_dir", True),
                lambda path: check_output_file(path, True),
            ):
                with pytest.raises(UsageError, match="no permission to write in"):
                    check(f"{folder}/a/b")
        finally:
            if os.getresuid()[2] == 0:
                os.setresuid(0, 0, 0)
            os.chmod(folder, 0o755)


LINES = st.lists(
    st.text(max_size=20)
    | st.fixed_dictionaries(
        {},
        optional={
            "row": st.integers(-2, 5) | st.floats() | st.booleans() | st.none(),
            "score": st.floats() | st.integers() | st.text(max_size=3),
            "dataset": st.text(max_size=3) | st.none() | st.integers(),
            "subtasks": st.none() | st.dictionaries(st.text(max_size=2), st.floats(), max_size=2),
        },
    ).map(json.dumps),
    max_size=4,
).map("\n".join)


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(LINES | st.binary(max_size=30))
def test_any_score_file_reads_or_is_a_usage_error(tmp_path: Path, content: str | bytes):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        scores = read_scores(path)
    except UsageError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(scores, Scores)
        assert np.isfinite(scores.score).all() and (scores.row >= 0).all()
