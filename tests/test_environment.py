"""Who a process is: read in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex import environment, load_config
from dataflex.errors import UsageError

NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def test_a_launched_process_has_what_the_launcher_says(monkeypatch):
    for number, name in enumerate(sorted(NAMES)):
        monkeypatch.setenv(name, str(number + 2))
    found = (environment.local_rank(), environment.local_world_size(), environment.rank(), environment.world_size())
    assert found == (2, 3, 4, 5)
    assert environment.launched()
    assert load_config().world_size == 5


def test_what_a_shell_has_left_over_is_no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name in NAMES - {"RANK"}:
        monkeypatch.setenv(name, "7")
    found = (environment.local_rank(), environment.local_world_size(), environment.rank(), environment.world_size())
    assert found == (0, 1, 0, 1)
    assert not environment.launched()
    assert load_config(options={"per_device_train_batch_size": 3}).rows_per_step == 3


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="environment variable RANK is 'first'; expected a number"):
        environment.rank()


def test_it_is_read_in_one_place(repo: Path):
    """No other file names one of the variables."""
    files = [*(repo / "dataflex").rglob("*.py"), *(repo / "commands").rglob("*.py")]
    naming = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text in NAMES or (text.startswith("SLURM_") and " " not in text):
                naming.add(path.name)
    assert naming == {"environment.py"}


def test_it_needs_no_torch():
    code = "import sys, dataflex.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_alone_has_nothing_of_a_launcher():
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}
    assert environment.without_launcher({**launched, "PATH": "/bin"}) == {"PATH": "/bin"}
    assert not environment.launched(environment.without_launcher(launched))
