"""Names of selectors: what the table, the configuration and the help say agree, and what cannot run is told at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import dataflex
from dataflex import load_config
from dataflex.config import help_of
from dataflex.errors import UsageError
from dataflex.planning import plan
from dataflex.projection.table import PROJECTORS
from dataflex.selectors.table import PACKAGED, SELECTORS, find, make_selector, packaged_components, source_of

FRESH = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module of a new name with the given text, where Python finds it; returns the name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"selectors_of_a_test_{next(FRESH)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package with entry points of the group, given by name."""

    def install(package_name: str, **points: str) -> None:
        folder = tmp_path / f"site-{package_name}"
        info = folder / f"{package_name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package_name}\nVersion: 1.0\n")
        lines = [f"{name} = {value}\n" for name, value in points.items()]
        (info / "entry_points.txt").write_text("[dataflex.selectors]\n" + "".join(lines))
        monkeypatch.syspath_prepend(folder)

    return install


def test_every_selector_of_the_table_can_be_made():
    for name, entry in SELECTORS.items():
        found = find(name)
        assert f"{found.__module__}:{found.__qualname__}" == entry.source == source_of(name)
        assert isinstance(make_selector(name), found)


def test_table_components_configuration_and_help_agree(run_cli, repo):
    assert list(packaged_components()) == [*SELECTORS, *PACKAGED]
    readme = (repo / "README.md").read_text(encoding="utf-8")
    for name, entry in SELECTORS.items():
        assert load_config(overrides=[f"component_name={name}"]).selector == name
        assert f"{name}: {entry.help}." in help_of("component_name")
        assert f"| `{name}` | {entry.help} | {entry.cost} |" in readme
    for name, component in PACKAGED.items():
        assert load_config(overrides=[f"component_name={name}"]).selector == component["name"]
        assert f"| `{name}` |" in readme
        assert f" {name}: " in help_of("component_name")
    shown = " ".join(run_cli("dynamic", "--help-all").stdout.split())
    for name, entry in PROJECTORS.items():
        assert f"{name}: {entry.help}." in help_of("projector")
        assert f"{name}: {entry.help}" in shown


def test_the_table_and_the_configuration_are_read_without_torch():
    code = (
        "import sys; from dataflex import load_config; from dataflex.selectors.table import packaged_components; "
        "load_config(overrides=['component_name=no.such:Selector']); packaged_components(); "
        "sys.exit(bool({'torch', 'no', 'dataflex.selectors.less'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestNames:
    def test_an_unknown_name_lists_what_there_is(self, package):
        package("somebody", mine="somewhere:Loss")
        with pytest.raises(
            UsageError,
            match=r"no selector 'lees'; there are less, .*length, less-contrast, .*mine, and package\.module",
        ):
            find("lees")
        with pytest.raises(UsageError, match=r"key 'component_name': no selector 'randm'.*did you mean 'random'\?$"):
            load_config(overrides=["component_name=randm"])

    def test_a_components_file_may_name_any_selector(self, package, tmp_path: Path):
        package("somebody", mine="somewhere:Loss")
        path = tmp_path / "parts.yaml"
        path.write_text("a: {name: 'some.where:Else', params: {reduce: mean}}\nb: {name: mine}\nc: {name: lees}\n")
        found = [load_config(overrides=[f"components_cfg_file={path}", f"component_name={name}"]) for name in "ab"]
        assert [(config.selector, config.reduce) for config in found] == [("some.where:Else", "mean"), ("mine", "max")]
        with pytest.raises(UsageError, match=r"parts.yaml, 'c': no selector 'lees'.*did you mean 'less'"):
            load_config(overrides=[f"components_cfg_file={path}", "component_name=c"])
        # a class can be named beside a components file, a plain name is one of the file's
        assert load_config(overrides=[f"components_cfg_file={path}", "component_name=x.y:Z"]).selector == "x.y:Z"
        with pytest.raises(UsageError, match=r"no 'less' in components file .*parts.yaml; it has a, b, c"):
            load_config(overrides=[f"components_cfg_file={path}", "component_name=less"])

    @pytest.mark.parametrize("name", [":Long", "mod:", "a:b:c", "a-b:C", "a..b:C", "a b:C", ":"])
    def test_a_path_of_another_form(self, name: str):
        with pytest.raises(UsageError, match=r"expected package\.module:Class"):
            find(name)
        with pytest.raises(UsageError, match=r"key 'selector': .*expected package\.module:Class$"):
            load_config(options={"selector": name})

    def test_an_entry_point_of_another_form(self, package):
        package("somebody", mine="somewhere")
        with pytest.raises(
            UsageError, match=r"'mine': its entry point in the package somebody is 'somewhere'; expected"
        ):
            load_config(overrides=["component_name=mine"])

    def test_a_name_that_two_packages_give(self, package):
        package("one", mine="one:Loss")
        package("two", mine="two:Loss")
        with pytest.raises(UsageError, match=r"'mine': the packages one, two each have one; name yours as package"):
            find("mine")

    def test_a_package_cannot_take_a_name_of_the_table(self, package):
        package("somebody", less="somewhere:Else")
        assert source_of("less") == SELECTORS["less"].source


SCORE = "\n    def score(self, situation): ..."
BROKEN = {
    "no module": (None, "A", r"no module nowhere_at_all; install its package, or put its folder on PYTHONPATH"),
    "raises": ("raise RuntimeError('no\\nluck')", "A", r"importing \w+ fails with RuntimeError: no$"),
    "misses a library": ("import nothing_like_it", "A", r"fails with ModuleNotFoundError: No module named 'nothing_"),
    "is no Python": ("class :", "A", r"fails with SyntaxError"),
    "ends the process": ("import sys; sys.exit(0)", "A", r"fails with SystemExit"),
    "no class": (f"class Alpha:{SCORE}", "Alfa", r"has no class Alfa; did you mean 'Alpha'"),
    "no score": (
        "class A:\n    def select(self, x): ...",
        "A",
        r"`score\(self, situation\)`, found the class A without",
    ),
    "score is data": ("class A:\n    score = 3", "A", r"expected a class with a method `score"),
    "a function": ("def A(situation): ...", "A", r"expected a class .* found a function"),
    "arguments": (f"class A:\n    def __init__(self, x): ...{SCORE}", "A", r"A\(\), made without arguments, fails"),
    "score of nothing": ("class A:\n    def score(self): ...", "A", r"found `score\(self\)` \(too many positional"),
    "score of more": ("class A:\n    def score(self, x, y): ...", "A", r"found `score\(self, x, y\)` \(missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_selector_is_told_before_anything_is_written(case, module, tiny_run, tmp_path, monkeypatch):
    text, name, message = BROKEN[case]
    source = f"{module(text) if text is not None else 'nowhere_at_all'}:{name}"
    config = load_config(options={**tiny_run, "component_name": source, "output_dir": str(tmp_path / "out")})
    for act in (lambda: dataflex.dynamic(config), lambda: plan(config, "dynamic"), lambda: make_selector(source)):
        with pytest.raises(UsageError, match=message) as raised:
            act()
        assert str(raised.value).startswith(f"selector {source!r}")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_broken_entry_point_is_told_with_its_class(package, module):
    name = module("")
    package("somebody", mine=f"{name}:Loss", gone="not_there.at_all:Loss")
    with pytest.raises(UsageError, match=rf"selector 'mine' \({name}:Loss\): the module {name} has no class Loss"):
        make_selector("mine")
    with pytest.raises(UsageError, match=r"selector 'gone' \(not_there.at_all:Loss\): there is no module not_there;"):
        make_selector("gone")


def test_the_command_line_says_it_in_one_line(tiny_run, tmp_path, run_cli):
    arguments = [f"{key}={value}" for key, value in {**tiny_run, "output_dir": tmp_path / "out"}.items()]
    done = run_cli("dynamic", *arguments, "component_name=not_there.at_all:Loss", check=False)
    assert done.returncode == 2
    assert "there is no module not_there; install its package" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
