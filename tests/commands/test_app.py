"""The command line itself: help without waiting, dry runs that touch nothing, one JSON object, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from dataflex import open_store
from dataflex.commands import app
from dataflex.commands.session import session

COMMANDS = tuple(app.COMMANDS)
CHECKPOINT = "warmup/checkpoint-4"
RUNS = {
    "dynamic": "dynamic run.yaml output_dir=out",
    "warmup": "warmup run.yaml output_dir=out",
    "train": "train run.yaml output_dir=out",
    "grads": f"grads run.yaml --checkpoint {CHECKPOINT} -o new.h5",
    "grads of eval": f"grads run.yaml --split eval --checkpoint {CHECKPOINT} -o new.h5",
    "score": "score --train train.h5 --eval eval.h5 -o new.jsonl",
    "score --exact": f"score run.yaml --exact --checkpoint {CHECKPOINT} -o new.jsonl",
    "eval": f"eval run.yaml --adapter {CHECKPOINT} -o new.json",
    "select": "select run.yaml --scores scores.jsonl --count 3 -o new.jsonl",
    "merge": f"merge run.yaml --adapter {CHECKPOINT} --export-dir out",
}


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from typer.testing import CliRunner; from dataflex.commands.app import app; "
        "print(CliRunner().invoke(app, ['--help']).exit_code); "
        "print([name for name in ('torch', 'transformers', 'peft', 'h5py', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["0", "[]"]


def test_help_lists_the_commands_and_shows_no_argument_as_help(cli, run_cli):
    said = run_cli("--help").stdout
    assert all(f" {command} " in said for command in COMMANDS)
    bare = cli()
    assert bare.exit_code == 2 and "Usage" in bare.output


@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_touches_nothing(name: str, bench: Path, cli, tree):
    before = tree(bench)
    result = cli(*RUNS[name].split(), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stdout.startswith(name.split()[0])
    assert "nothing was written" in result.stderr

    result = cli(*RUNS[name].split(), "--dry-run", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["command"], found["dry_run"]) == (name.split()[0], True)
    assert tree(bench) == before


def test_a_dry_run_says_what_would_happen(bench: Path, cli):
    found = json.loads(cli(*RUNS["dynamic"].split(), "--dry-run", "--json").stdout)
    assert found["schedule"] == {
        "steps": 6,
        "rounds": 1.0,
        "steps_per_round": 6,
        "rows_per_step": 2,
        "warmup_steps": 4,
        "selections": [4],
        "rows_per_selection": 4,
    }
    assert {name: (data["rows"], data["kept"]) for name, data in found["data"].items()} == {
        "train": (12, 12),
        "eval": (4, 4),
    }
    assert found["data"]["eval"]["longest"] <= 96 and found["data"]["eval"]["truncated"] == 4
    assert found["sizes"]["adapter_parameters"] == 8192
    assert found["sizes"]["gradient_seconds"] > 0 < found["sizes"]["training_seconds"]
    assert found["config"]["proj_dim"] == 256

    stores = json.loads(cli(*RUNS["grads"].split(), "--dry-run", "--json").stdout)["sizes"]["store_bytes"]
    assert stores == pytest.approx(Path("train.h5").stat().st_size, rel=0.7)  # metadata weighs in with 12 rows


@pytest.mark.parametrize("name", RUNS)
def test_json_is_one_object_on_stdout(name: str, bench: Path, cli):
    result = cli(*RUNS[name].split(), "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    facts = json.loads(result.stdout)
    assert facts["command"] == name.split()[0]
    path = facts.get("output") or facts.get("output_dir") or facts.get("checkpoint") or facts.get("export_dir")
    assert Path(path).exists()


def test_what_libraries_print_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]):
    with session(None, {}, as_json=True, quiet=False) as running:
        print("chatter")
        running.console.result(["x"], {"a": 1})
    captured = capsys.readouterr()
    assert captured.out == '{"a": 1}\n'
    assert "chatter" in captured.err


def test_a_session_leaves_signals_and_warnings_as_they_were():
    import warnings

    before = (signal.getsignal(signal.SIGTERM), warnings.showwarning, sys.stdout)
    with session(None, {}, as_json=False, quiet=True):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), warnings.showwarning, sys.stdout) == before


def test_commands_run_in_other_threads_too(bench: Path, cli):
    results = []
    thread = threading.Thread(target=lambda: results.append(cli(*RUNS["select"].split())))
    thread.start()
    thread.join()
    assert results[0].exit_code == 0, results[0].stderr


def test_peers_keys_are_warned_of_once(bench: Path, run_cli):
    done = run_cli(*RUNS["select"].split(), "torch_compile=true", "use_cache=false", cwd=bench)
    assert done.stderr.count("warning:") == 1
    assert "torch_compile, use_cache" in done.stderr


def test_zero_is_a_value(bench: Path, cli):
    lines = [{"row": row, "score": row - 2} for row in range(5)]
    Path("scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cli("select", "run.yaml", "--scores", "scores.jsonl", "--threshold", "0", "-o", "new.jsonl")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["dataflex"]["row"] for line in Path("new.jsonl").read_text().splitlines()] == [4, 3, 2]


def test_an_interrupted_store_is_gone_on_with_to_the_same_bytes(bench: Path, data_dir: Path, cli):
    """SIGINT, SIGTERM and SIGKILL one after the other; what was committed stays, and the end is the same."""
    args = ["grads", "run.yaml", "--checkpoint", CHECKPOINT, "--dataset", "alpaca_en_demo", "--dataset-dir", data_dir]
    args += ["max_samples=120", "token_budget=96"]  # many small batches, so that it can be caught
    assert cli(*args, "-o", "whole.h5").exit_code == 0

    committed = 0
    for number, code, says in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGKILL, -9, ""),
    ):
        process = start(*args, "-o", "cut.h5")
        try:
            wait_for_rows(process, Path("cut.h5"), committed + 5)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, stdout) == (code, ""), stderr
        assert says in stderr and "Traceback" not in stderr
        with h5py.File("cut.h5", "r") as file:  # plain h5py
            done = file["done"][:]
        assert committed + 5 <= done.sum() < 120
        committed = int(done.sum())
        with open_store("cut.h5") as cut, open_store("whole.h5") as whole:
            rows = np.flatnonzero(done)
            np.testing.assert_array_equal(cut[rows], whole[rows])

    assert Path("cut.h5").read_bytes() != Path("whole.h5").read_bytes()
    assert cli(*args, "-o", "cut.h5").exit_code == 0
    assert Path("cut.h5").read_bytes() == Path("whole.h5").read_bytes()

    modified = Path("cut.h5").stat().st_mtime_ns
    assert cli(*args, "-o", "cut.h5").exit_code == 0  # nothing is left to do
    assert Path("cut.h5").stat().st_mtime_ns == modified


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dataflex", *map(str, args)]
    return subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(process: subprocess.Popen[str], path: Path, rows: int) -> None:
    """Until that many rows of the store are committed."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended before it was interrupted: {process.communicate()[1]}")
        if path.exists():
            with h5py.File(path, "r") as file:
                if file["done"][:].sum() >= rows:
                    return
        time.sleep(0.005)
    pytest.fail(f"not {rows} rows in two minutes")


FURTHER = {
    "inspect": "inspect train.h5",
    "report": "report scores.jsonl run.yaml",
    "bench": "bench run.yaml",
    "env": "env",
    "init": "init started",
    "keys": "keys seed",
}


@pytest.mark.parametrize("name", [*RUNS, *FURTHER])
def test_json_has_the_keys_that_the_page_names(name: str, bench: Path, cli, repo: Path):
    lines = (repo / "docs" / "scripting.md").read_text(encoding="utf-8").splitlines()
    command, *rest = {**RUNS, **FURTHER}[name].split()
    line = next(line for line in lines if line.startswith(f"| `{command}` |"))
    keys = {"keys"} if command == "keys" else set(re.findall(r"`(\w+)`", line)) - {command}
    if command == "inspect":
        keys -= {"data", "example"}
    result = cli(command, *rest, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() - {"command", "written"} == keys
    assert all(Path(path).exists() for path in found.get("written", []))
