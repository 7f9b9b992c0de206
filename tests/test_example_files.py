"""Every YAML in examples/ is run on a tiny model, every DeepSpeed file is checked. A YAML without a rule fails.

A rule is the commands that run the file. SMALL holds the keys that make a run take seconds. LARGE holds the keys in
place of what a test has not got, with the reason.
"""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dataflex.commands.app import app

SMALL = "cutoff_len=64 lora_rank=4 per_device_train_batch_size=2 token_budget=400 proj_dim=256 max_samples=8"
SMALL += " warmup_step=2 update_step=1 update_times=1"

# less.yaml as it stands is a run of hours on GPUs.
LARGE = {
    "model_name_or_path=models/SmolLM2-135M-Instruct": "Llama-3.1-8B is 16 GB and asks for a licence",
    "deepspeed=null": "ZeRO-3 needs a launcher; tests/test_processes.py trains with it",
    "template=smollm2": "llama3's tokens are not in the tiny model's vocabulary",
}
LESS = f"dynamic examples/less.yaml {' '.join(LARGE)} {SMALL}"

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
SELECTORS = yaml.safe_load((EXAMPLES / "components.yaml").read_text(encoding="utf-8"))["selectors"]

PEERS = ("run_bergson.py", "run_dataflex.py", "run_trak.py")  # import other projects, which a test has not got

# Each YAML and the commands that execute it, in order.
RULES = {
    "components.yaml": [f"{LESS} component_name={name} overwrite_output_dir=true" for name in SELECTORS],
    "demo.yaml": [f"dynamic examples/demo.yaml {SMALL} --overwrite"],
    "less.yaml": [LESS],
    "merge.yaml": [  # merges what less.yaml makes
        LESS,
        "merge examples/merge.yaml --overwrite template=smollm2 model_name_or_path=models/SmolLM2-135M-Instruct",
    ],
    "pipeline.yaml": [  # the other commands of examples/pipeline.sh follow in tests/test_readme.py
        f"warmup examples/pipeline.yaml {SMALL} output_dir=saves/warmup",
        f"grads examples/pipeline.yaml {SMALL} --checkpoint saves/warmup/checkpoint-2 -o saves/train.h5",
    ],
}


def run(command: str) -> dict:
    """Run `dataflex COMMAND --json` in this process; the object it prints."""
    result = CliRunner().invoke(app, [*shlex.split(command), "--json", "--quiet"])
    assert result.exit_code == 0, f"dataflex {command}\n{result.stderr}"
    return json.loads(result.stdout)


def test_every_yaml_has_a_rule() -> None:
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.y*ml")}
    assert found == set(RULES)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_yaml_runs(name: str, checkout: Path) -> None:
    for command in RULES[name]:
        facts = run(command)
        assert Path(
            facts.get("output_dir") or facts.get("output") or facts.get("export_dir") or facts["checkpoint"]
        ).exists()


def test_less_yaml_is_checked_as_it_stands(checkout: Path) -> None:
    found = run("dynamic examples/less.yaml --dry-run")
    assert found["schedule"]["steps"] == 30
    assert found["config"]["deepspeed"] == "examples/deepspeed/ds_z3_config.json"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_a_deepspeed_file_is_taken(path: Path, checkout: Path) -> None:
    """By dataflex; and by DeepSpeed, which refuses ZeRO keys and values it does not know. "auto" is filled in later."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = run(f"dynamic examples/demo.yaml {SMALL} deepspeed={path.relative_to(EXAMPLES.parent)} --dry-run")
    assert found["config"]["deepspeed"].endswith(path.name)
    zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})


@pytest.mark.parametrize("name", sorted({path.name for path in BENCHMARKS.glob("*.py")} - {*PEERS}))
def test_a_benchmark_script_finds_what_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / name), run_name="imported")


def test_score_store_runs_on_a_few_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["score_store.py", "--rows", "30"])
    runpy.run_path(str(BENCHMARKS / "score_store.py"), run_name="__main__")
    assert "30 rows" in capsys.readouterr().out
