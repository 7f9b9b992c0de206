"""What a newcomer begins with: init, keys, env, and the command that each command names as the next one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from dataflex.config import MARKS
from dataflex.starting import FILES


def test_a_starter_project_runs_as_it_is(tiny_model_dir: Path, tmp_path: Path, monkeypatch, cli) -> None:
    """From another folder, with spaces in its name: run, evaluation, and the check of what a comparison would do."""
    monkeypatch.chdir(tmp_path)
    made = cli("init", "my first", "--model", tiny_model_dir)
    assert made.stdout.splitlines() == [f"my first/{name}" for name in FILES]
    assert "next: dataflex dynamic 'my first/run.yaml' --dry-run" in made.stderr
    run = cli("dynamic", "my first/run.yaml", "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["output_dir"] == "my first/saves/run"
    evaluated = cli("eval", "my first/run.yaml", "--adapter", "my first/saves/run", "-o", "eval.json", "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["rows"] == 4
    compared = cli("compare", "my first/run.yaml", "-o", "compared", "--dry-run", "--json")
    assert compared.exit_code == 0, compared.stderr
    assert json.loads(compared.stdout)["schedule"]["arms"][:3] == ["untouched", "random", "length"]
    for name in yaml.safe_load((tmp_path / "my first/components.yaml").read_text())["selectors"]:
        dry = cli("dynamic", "my first/run.yaml", f"component_name={name}", "output_dir=other", "--dry-run")
        assert dry.exit_code == 0, dry.stderr


def test_init_keeps_what_is_there(tmp_path: Path, monkeypatch, cli) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("init", "--dry-run").exit_code == 0
    assert not list(tmp_path.iterdir())
    assert cli("init", "-q").exit_code == 0
    assert "dataset_dir: data" in Path("run.yaml").read_text()
    Path("run.yaml").write_text("mine")
    Path("components.yaml").unlink()
    refused = cli("init")
    assert refused.exit_code == 2 and "run.yaml, data/dataset_info.json" in refused.stderr
    assert Path("run.yaml").read_text() == "mine" and not Path("components.yaml").exists()
    assert cli("init", "--overwrite").exit_code == 0
    assert "mine" not in Path("run.yaml").read_text()
    refused = cli("init", "run.yaml")
    assert refused.exit_code == 2 and "name a folder" in refused.stderr


def test_keys_lists_every_key_once_and_finds_by_a_word(cli) -> None:
    every = json.loads(cli("keys", "--json").stdout)["keys"]
    assert sorted(key["key"] for key in every) == sorted(set(MARKS) - {"training_arguments"})
    rate = json.loads(cli("keys", "learning_rate", "--json").stdout)["keys"]
    assert rate[0]["key"] == "learning_rate" and rate[0]["default"] == 5e-5 and "train" in rate[0]["used_by"]
    said = cli("keys", "prefilter").stdout
    assert said.startswith("# ") and "prefilter: null" in said
    refused = cli("keys", "learning_rat3")
    assert refused.exit_code == 2 and "did you mean 'learning_rate'" in refused.stderr


def test_env_says_what_a_report_of_a_fault_needs(cli) -> None:
    import torch

    found = json.loads(cli("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["gpus"] == [] and found["memory_gib"] > 1 and found["optional"]["fast_jl"] is None
    assert "fast_jl not installed" in cli("env").stdout


NEXT = {
    "warmup run.yaml output_dir=out": "grads run.yaml --checkpoint out/checkpoint-4 -o out/train.h5",
    "grads run.yaml --checkpoint warmup/checkpoint-4 -o out/train.h5": (
        "grads run.yaml --checkpoint warmup/checkpoint-4 --split eval -o out/eval.h5"
    ),
    "grads run.yaml --checkpoint warmup/checkpoint-4 --split eval -o eval.h5 --overwrite": (
        "score --train train.h5 --eval eval.h5 -o scores.jsonl"
    ),
    "score run.yaml --train train.h5 --eval eval.h5 -o found.jsonl": (
        "select run.yaml --scores found.jsonl --data alpaca,identity --top 5% -o subset.jsonl"
    ),
    "score run.yaml --train train.h5 --eval eval.h5 -o found.jsonl dataset_dir=data": (
        "select run.yaml --scores found.jsonl --data alpaca,identity --top 5% -o subset.jsonl dataset_dir=data"
    ),
    "select run.yaml --scores scores.jsonl --count 3 -o subset.jsonl": (
        "train run.yaml --dataset subset.jsonl -o saves/selected"
    ),
    "train run.yaml output_dir=out": "eval run.yaml --adapter out -o out/eval.json",
}


@pytest.mark.parametrize("typed", NEXT)
def test_a_command_names_the_next_one_which_can_be_pasted(typed: str, bench: Path, cli) -> None:
    done = cli(*typed.split())
    assert done.exit_code == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert line == f"next: dataflex {NEXT[typed]}"
    assert done.output.splitlines()[-1] == line  # on a terminal it stands below the result
    planned = cli(*shlex.split(line)[2:], "--overwrite", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "next: " not in cli(*typed.split(), "--overwrite", "-q").stderr
