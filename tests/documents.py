"""What tests of documents share: their blocks, read and run.

bash reads each shell block in a folder like the reader's, with nothing on its PATH, and writes down every command that
the block would start. The commands are then run one by one in this process, whole or as RULES say. A block in another
language, or a command without a rule, fails. A block with a title is written to the file of that name.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dataflex.commands.app import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CHINESE = ROOT / "README.zh.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

# Over the keys of the documents' YAMLs and of examples/pipeline.yaml, which make runs of minutes.
SMALL = {
    "cutoff_len": 64,
    "lora_rank": 4,
    "max_samples": 24,
    "per_device_train_batch_size": 2,
    "update_step": 2,
    "num_train_epochs": 1.0,
    "proj_dim": 256,
    "token_budget": 400,
    "logging_steps": 1,
}
RECORD = r"""
command_not_found_handle() {
    { for name in $(compgen -e); do case $name in PWD|OLDPWD|SHLVL|_) ;; *) printf '%s\0' "$name=${!name}" ;; esac; done
      printf '%s\0' "$@"; printf '\0'; } >> "$RECORDED"
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document. One with a title is a file of that name."""

    language: str
    title: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.findall(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', text, flags=re.MULTILINE | re.DOTALL)
    assert 2 * len(found) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), f"{document}: a block is not read"
    return [Block(*parts) for parts in found]


def shell_of(document: Path) -> list[str]:
    """The shell blocks of a document."""
    return [block.text for block in blocks_of(document) if block.language == "bash"]


@dataclass(frozen=True)
class Command:
    """A command that a shell block starts, and the environment variables that the block gives it."""

    words: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        return shlex.join([*(f"{key}={value}" for key, value in self.environment.items()), *self.words])


def commands_of(block: str, folder: Path) -> list[Command]:
    """What `block` would start, as bash reads it in `folder`: variables set, comments gone, quotes undone."""
    record = folder / "recorded"
    record.write_bytes(b"")
    environment = {"PATH": str(folder / "nothing"), "RECORDED": str(record)}
    bash = [str(shutil.which("bash")), "--norc", "-eu", "-c", RECORD + block]
    subprocess.run(bash, cwd=folder, env=environment, check=True, capture_output=True)
    found = []
    for entry in record.read_text(encoding="utf-8").split("\0\0")[:-1]:
        words = entry.split("\0")
        given = [word for word in words if re.match(r"[A-Z_]+=", word)]
        variables = dict(word.split("=", 1) for word in given)
        found.append(
            Command(
                tuple(words[len(given) :]),
                {key: value for key, value in variables.items() if key not in environment},
            )
        )
    return found


def run_whole(command: Command) -> None:
    """As it stands."""
    result = CliRunner().invoke(app, command.words[1:])
    assert result.exit_code == 0, f"{command}\n{result.stderr}"


def run_dry(command: Command) -> None:
    """With --dry-run, without what starts it in several processes; a step of theirs has a few rows."""
    words = command.words[command.words.index("dataflex") :]
    few = ["per_device_train_batch_size=1", "gradient_accumulation_steps=1", "update_step=1", "overwrite=true"]
    result = CliRunner().invoke(app, [*words[1:], *few, "--dry-run"])
    assert result.exit_code == 0, f"{command}\n{result.stderr}"


def run_python(command: Command) -> None:
    """The script, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(command.words[1:]))
        runpy.run_path(command.words[1], run_name="__main__")


def is_a_target(command: Command) -> None:
    """Make knows the target; nothing is made."""
    subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, check=True, capture_output=True)


def run_script(command: Command) -> None:
    """The commands of the script, one by one."""
    for inner in commands_of(Path(command.words[1]).read_text(encoding="utf-8"), Path.cwd()):
        rule_for(inner)(inner)


def is_a_way_to_install(command: Command) -> None:
    """The folder to install is one that the release test builds and installs from."""
    assert command.words[-1] == "." and (ROOT / "pyproject.toml").exists()


# What to do with a command, by the pattern it matches first, and why it is not run whole.
RULES: list[tuple[str, Callable[[Command], None], str]] = [
    (r"make (demo|test|bench)$", is_a_target, "it builds an environment, fetches a model or runs these tests"),
    (r"(uv )?pip install \.$", is_a_way_to_install, "it downloads torch; tests/test_release.py installs a release"),
    (r"dataflex .*--nproc 8", run_dry, "it takes 8 GPUs; tests/test_processes.py runs with 2 processes"),
    (r"FORCE_TORCHRUN=1 .*dataflex ", run_dry, "it takes two machines; tests/test_processes.py has the launcher"),
    (r"srun --kill-on-bad-exit dataflex ", run_dry, "it takes SLURM; tests/test_processes.py has its variables"),
    (r"dataflex [a-z]+( |$)", run_whole, ""),
    (r"python examples/ask\.py ", run_python, ""),
    (r"bash examples/pipeline\.sh$", run_script, ""),
]


def rule_for(command: Command) -> Callable[[Command], None]:
    for pattern, rule, _ in RULES:
        if re.match(pattern, str(command)):
            return rule
    pytest.fail(f"no rule in {Path(__file__).name} for the command `{command}`", pytrace=False)


def lay_small_keys_over(text: str) -> str:
    """A YAML with SMALL over its keys."""
    return yaml.safe_dump({**yaml.safe_load(text), **SMALL})


def run_document(document: Path, folder: Path) -> None:
    """Its blocks from top to bottom in `folder`, the working directory: files written, commands and Python run."""
    for block in blocks_of(document):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            text = lay_small_keys_over(block.text) if block.language == "yaml" else block.text
            path.write_text(text, encoding="utf-8")
        elif block.language == "bash":
            for command in commands_of(block.text, folder):
                rule_for(command)(command)
        elif block.language == "python":
            exec(compile(block.text, str(document), "exec"), {})
        else:
            assert block.language == "", f"{document}: a block in {block.language} without a title is not run"


def make_reader(folder: Path, data_dir: Path) -> None:
    """Make `folder`, a checkout, the folder of a reader who has rows of their own; SMALL lies over the pipeline."""
    rows = json.loads((data_dir / "identity.json").read_text(encoding="utf-8"))
    for name, chosen in (
        ("my_rows.jsonl", rows[:16]),
        ("what_i_want.jsonl", rows[-3:]),
        ("held_out.jsonl", rows[-6:-3]),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    pipeline = folder / "examples" / "pipeline.yaml"
    pipeline.write_text(lay_small_keys_over(pipeline.read_text(encoding="utf-8")), encoding="utf-8")
