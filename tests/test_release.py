"""What a release is: a wheel and a source distribution that install and run away from the checkout, under one version.

The new environments see the libraries of this one, so that nothing is downloaded; dataflex itself is installed anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

from dataflex.distribution import NAME, NAMESAKE, namesake_notice, namesake_version, own_version

# From DataFlex 1.1.0's own metadata, and from what this project's checkouts were installed as before 0.2.0.
OF_DATAFLEX = "Project-URL: Github, https://github.com/OpenDCAI/DataFlex\nRequires-Dist: llamafactory>=0.9.5\n"
OF_OLD_CHECKOUT = "Author: The dataflex authors\n"


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of a copy of the repository, and the wheel that was built from it."""
    copy = tmp_path_factory.mktemp("source") / "dataflex"
    parts = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "dataflex", "commands", "docs", "examples"]
    copy.mkdir()
    run("cp", "-r", *parts, copy, cwd=repo)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, cwd=folder)
    return folder


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_a_release_runs_outside_the_checkout(
    pattern: str, built: Path, tiny_run: dict, repo: Path, tmp_path: Path
) -> None:
    """Installed in an environment without dataflex, the command runs in a folder that has only a configuration."""
    (archive,) = built.glob(pattern)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python3.*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", archive, cwd=tmp_path)

    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_run, "output_dir": "saves"}), encoding="utf-8")
    command = environment / "bin" / "dataflex"
    assert run(command, "--version", cwd=tmp_path).stdout == f"dataflex {own_version()}\n"
    done = run(command, "dynamic", "run.yaml", cwd=tmp_path)
    assert done.stdout == "saves\n"
    record = json.loads((tmp_path / "saves" / "run.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["versions"]["dataflex"] == own_version()
    where = run(environment / "bin" / "python", "-c", "import dataflex; print(dataflex.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(packages)


def test_the_version_stands_in_one_place(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["name"], project["version"]) == (NAME, own_version())
    log = (repo / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", log, flags=re.MULTILINE)[0] == own_version()
    code = [*(repo / "dataflex").rglob("*.py"), *(repo / "commands").rglob("*.py")]
    assert not [path.name for path in code if f'"{own_version()}"' in path.read_text(encoding="utf-8")]


def install(folder: Path, version: str, metadata: str) -> None:
    """Metadata of a distribution named dataflex, as pip leaves it in a site-packages folder."""
    info = folder / f"{NAMESAKE}-{version}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.4\nName: {NAMESAKE}\nVersion: {version}\n"
    (info / "METADATA").write_text(head + metadata, encoding="utf-8")


def test_the_other_dataflex_is_told_of_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "1.1.0", OF_DATAFLEX)
    monkeypatch.syspath_prepend(tmp_path)
    assert namesake_version() == "1.1.0"
    notice = str(namesake_notice())
    assert "OpenDCAI's DataFlex 1.1.0" in notice
    assert f"pip uninstall {NAMESAKE} {NAME}" in notice


def test_an_earlier_checkout_is_not_the_other_dataflex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "0.1.0", OF_OLD_CHECKOUT)
    monkeypatch.syspath_prepend(tmp_path)
    assert namesake_version() is namesake_notice() is None


def test_a_command_begins_with_the_notice(data_dir: Path, tmp_path: Path, run_cli) -> None:
    """On stderr and not under --quiet, from metadata alone: the other project is not imported."""
    install(tmp_path, "1.1.0", OF_DATAFLEX)
    inspect = ["inspect", "identity", "--dataset-dir", data_dir]
    told = run_cli(*inspect, env={"PYTHONPATH": str(tmp_path)})
    assert told.stderr.startswith("warning: OpenDCAI's DataFlex 1.1.0")
    assert "OpenDCAI" not in told.stdout + run_cli(*inspect).stderr
    assert "OpenDCAI" not in run_cli(*inspect, "--quiet", env={"PYTHONPATH": str(tmp_path)}).stderr
