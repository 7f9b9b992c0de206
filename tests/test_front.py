"""What `import dataflex`, `dataflex --help` and `dataflex --version` give, and which libraries they import."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import dataflex
from dataflex.commands.app import COMMANDS, app

HEAVY = ("torch", "transformers", "peft", "h5py", "matplotlib", "numpy", "pydantic_core", "yaml")


def imported_for_type_checkers(module: ModuleType) -> dict[str, str]:
    """Each name that the module imports under `if TYPE_CHECKING:`, and from where."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}


def heavy_after(code: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    ask = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stderr.split()


def test_type_checkers_see_the_names_that_are_handed_on():
    assert imported_for_type_checkers(dataflex) == dataflex.HOMES
    assert dataflex.__all__ == sorted([*dataflex.HOMES, "__version__"])


@pytest.mark.parametrize("name", sorted(dataflex.HOMES))
def test_a_name_is_what_its_module_holds(name: str):
    assert getattr(dataflex, name) is getattr(importlib.import_module(dataflex.HOMES[name]), name)
    assert name in dir(dataflex)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dataflex.trian


def test_import_dataflex_imports_nothing_heavy():
    assert heavy_after("import dataflex") == []
    assert "torch" in heavy_after("import dataflex; dataflex.train")  # the question can be answered with yes


def test_help_imports_nothing_heavy():
    run = "from dataflex.commands.app import app; from typer.testing import CliRunner; "
    assert heavy_after(run + "assert CliRunner().invoke(app, ['--help']).exit_code == 0") == []
    of_command = heavy_after(run + "assert CliRunner().invoke(app, ['grads', '--help']).exit_code == 0")
    assert "pydantic_core" in of_command and "torch" not in of_command


def test_the_version_is_the_one_in_pyproject(repo: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]):
    declared = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    installed = importlib.metadata.version("dataflex-less")
    if installed != declared:
        pytest.fail(f"dataflex {installed} is installed and pyproject.toml says {declared}: run `make setup`")
    assert dataflex.__version__ == declared
    assert run_cli("--version").stdout == f"dataflex {declared}\n"


@pytest.mark.parametrize("arguments", [[], *[[name] for name in COMMANDS]], ids=lambda arguments: "".join(arguments))
def test_short_help_is_help(arguments: list[str]):
    short, long = (CliRunner().invoke(app, [*arguments, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout != ""


def test_the_table_of_commands_is_complete(repo: Path):
    """commands/NAME.py holds the function NAME if it says an EXAMPLE; the table has each such file and its sentence."""
    named = {path.stem for path in (repo / "commands").glob("*.py") if "\nEXAMPLE = " in path.read_text("utf-8")}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_group_says_of_a_command_what_the_command_says(name: str):
    function = getattr(importlib.import_module(f"dataflex.commands.{name}"), name)
    assert (inspect.getdoc(function) or "").split("\n\n")[0] == COMMANDS[name]
    own_help = " ".join(CliRunner().invoke(app, [name, "--help"]).stdout.split())
    assert COMMANDS[name] in own_help


def test_imports_run_in_no_circle(repo: Path):
    """Imports at the head of a module; one inside a function is made when all modules are there."""
    files = {
        ".".join(path.relative_to(repo).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (repo / "dataflex").rglob("*.py")
    }
    heads: dict[str, set[str]] = {}
    for name, path in files.items():
        found = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        heads[name] = ({node.module for node in found} | names) & files.keys() - {name, "dataflex"}
    list(graphlib.TopologicalSorter(heads).static_order())  # raises CycleError, which names the circle
