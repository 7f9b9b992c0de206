"""README.md, executed: its YAML is the run, its shell blocks and its Python are run in order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import (
    CHINESE,
    PAGES,
    README,
    ROOT,
    RULES,
    Command,
    blocks_of,
    commands_of,
    make_reader,
    rule_for,
    run_document,
    shell_of,
)


def test_every_command_has_a_rule_and_every_rule_a_command(tmp_path: Path) -> None:
    blocks = [block for document in (README, CHINESE, *PAGES) for block in shell_of(document)]
    assert all(commands_of(block, tmp_path) for block in blocks)
    commands = [command for block in blocks for command in commands_of(block, tmp_path)]
    for command in commands:
        rule_for(command)
    for pattern, _, _ in RULES:
        assert any(re.match(pattern, str(command)) for command in commands), pattern


def test_bash_reads_what_a_shell_would(tmp_path: Path) -> None:
    block = "out=a/b # why\nA=1 B='2 3' dataflex x $out/y \"z w\" > log\nsrun \\\n  -n 2 dataflex\n"
    assert commands_of(block, tmp_path) == [
        Command(("dataflex", "x", "a/b/y", "z w"), {"A": "1", "B": "2 3"}),
        Command(("srun", "-n", "2", "dataflex"), {}),
    ]


def test_the_pipeline_script_is_the_block_in_the_readme(tmp_path: Path) -> None:
    script = (ROOT / "examples" / "pipeline.sh").read_text(encoding="utf-8")
    (block,) = [text for text in shell_of(README) if "dataflex warmup" in text]
    of_script = commands_of(script, tmp_path)
    assert [command.words for command in of_script] == [command.words for command in commands_of(block, tmp_path)]


def test_the_readme_runs_from_top_to_bottom(checkout: Path, data_dir: Path) -> None:
    make_reader(checkout, data_dir)
    run_document(README, checkout)
    assert (checkout / "saves/mine/run.json").exists() and (checkout / "saves/second/run.json").exists()
    assert (checkout / "saves/pipeline/merged/model.safetensors").exists()


def test_the_chinese_readme_has_the_same_blocks() -> None:
    """Without the comments, which are translated."""

    def bare(document: Path) -> list[tuple[str, str, list[str]]]:
        found = []
        for block in blocks_of(document):
            lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.text.splitlines()]
            found.append((block.language, block.title, [line for line in lines if line]))
        return found

    assert bare(CHINESE) == bare(README)


@pytest.mark.parametrize("document", [README, CHINESE], ids=lambda path: path.name)
def test_what_a_readme_links_to_is_there(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("words", ["pip install dataflex", "make everything", "env dataflex dynamic run.yaml"])
def test_a_command_without_a_rule_fails(words: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule"):
        rule_for(Command(tuple(words.split()), {}))
