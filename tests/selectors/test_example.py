"""The example in the docstring of dataflex.selectors runs as it says, by its path and by an entry point's name."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import dataflex.selectors
from dataflex import load_config, load_examples
from dataflex.data.encoding import UNSUPERVISED


def documented_selector() -> str:
    """The module in the docstring: what is indented below the line that names its file."""
    [block] = re.findall(r"in a file mymod\.py of a package mypkg:\n\n((?:    .*\n|\n)+)", dataflex.selectors.__doc__)
    return textwrap.dedent(block)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the documented package and the entry point that the docstring gives it."""
    folder = tmp_path / "site"
    (folder / "mypkg").mkdir(parents=True)
    (folder / "mypkg" / "__init__.py").write_text("")
    (folder / "mypkg" / "mymod.py").write_text(documented_selector())
    info = folder / "mypkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypkg\nVersion: 1.0\n")
    [line] = re.findall(r'^    (long = "mypkg\.mymod:Long")$', dataflex.selectors.__doc__, re.MULTILINE)
    (info / "entry_points.txt").write_text("[dataflex.selectors]\n" + line.replace('"', "") + "\n")
    return folder


@pytest.mark.parametrize("name", ["mypkg.mymod:Long", "long"])
def test_the_documented_selector_picks_the_longest_rows(
    name: str, installed: Path, tiny_run: dict, run_cli: Callable, tmp_path: Path
):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_run, "output_dir": str(tmp_path / "out")}))
    paths = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    done = run_cli("dynamic", tmp_path / "run.yaml", f"component_name={name}", env={"PYTHONPATH": paths})
    lengths = {
        example.row: sum(label != UNSUPERVISED for label in example.labels)
        for example in load_examples(load_config(options=tiny_run))
    }
    longest = sorted(lengths, key=lambda row: (-lengths[row], row))[:4]
    for step in (3, 5):
        lines = (tmp_path / "out" / "selections" / f"step-{step}.jsonl").read_text().splitlines()
        picked = {record["row"]: record["score"] for record in map(json.loads, lines)}
        assert picked == {row: lengths[row] for row in longest}
    assert f"the longest row has {max(lengths.values())} supervised tokens" in done.stderr
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["selector"] == name


def test_the_example_is_short():
    assert len(documented_selector().strip().splitlines()) <= 20
