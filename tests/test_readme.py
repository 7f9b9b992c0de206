"""README.md, executed: its YAML is the run, its shell blocks and its Python are run in order, on a tiny model.

bash reads each shell block in a folder like the reader's, with nothing on its PATH, and writes down every command that
the block would start. The commands are then run one by one in this process, whole or as RULES say. A block in another
language, or a command without a rule, fails.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dataflex.commands.app import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "bash"]

# Over the keys of README's run.yaml and of examples/pipeline.yaml, which make runs of minutes.
SMALL = {
    "cutoff_len": 64,
    "lora_rank": 4,
    "max_samples": 16,
    "per_device_train_batch_size": 2,
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


# What to do with a command, by the pattern it matches first, and why it is not run whole.
RULES: list[tuple[str, Callable[[Command], None], str]] = [
    (r"make (demo|test|bench)$", is_a_target, "it builds an environment, fetches a model or runs these tests"),
    (r"dataflex .*--nproc 8", run_dry, "it takes 8 GPUs; tests/test_processes.py runs with 2 processes"),
    (r"FORCE_TORCHRUN=1 .*dataflex ", run_dry, "it takes two machines; tests/test_processes.py has the launcher"),
    (r"srun --kill-on-bad-exit dataflex ", run_dry, "it takes SLURM; tests/test_processes.py has its variables"),
    (r"dataflex (dynamic|inspect|bench|warmup|grads|score|select|train|merge) ", run_whole, ""),
    (r"python examples/ask\.py ", run_python, ""),
]


def rule_for(command: Command) -> Callable[[Command], None]:
    for pattern, rule, _ in RULES:
        if re.match(pattern, str(command)):
            return rule
    pytest.fail(f"README.md: no rule in {Path(__file__).name} for the command `{command}`", pytrace=False)


@pytest.fixture(scope="module")
def reader(checkout: Path, data_dir: Path) -> Iterator[Path]:
    """The reader's folder: a checkout, rows of their own, and README's YAML as run.yaml; SMALL lies over the YAMLs."""
    rows = json.loads((data_dir / "identity.json").read_text(encoding="utf-8"))
    for name, chosen in (("my_rows.jsonl", rows[:16]), ("what_i_want.jsonl", rows[-3:])):
        (checkout / name).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    (of_run,) = [text for language, text in BLOCKS if language == "yaml"]
    pipeline = (checkout / "examples" / "pipeline.yaml").read_text(encoding="utf-8")
    for path, text in ((checkout / "run.yaml", of_run), (checkout / "examples" / "pipeline.yaml", pipeline)):
        path.write_text(yaml.safe_dump({**yaml.safe_load(text), **SMALL}), encoding="utf-8")
    yield checkout


def test_every_language_is_known() -> None:
    """Blocks without a language show what is printed, and the folders."""
    assert {language for language, _ in BLOCKS} == {"bash", "yaml", "python", ""}


def test_every_command_has_a_rule_and_every_rule_a_command(tmp_path: Path) -> None:
    commands = [command for block in SHELL for command in commands_of(block, tmp_path)]
    assert all(commands_of(block, tmp_path) for block in SHELL)
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
    (block,) = [text for text in SHELL if "dataflex warmup" in text]
    of_script = commands_of(script, tmp_path)
    assert [command.words for command in of_script] == [command.words for command in commands_of(block, tmp_path)]


def test_the_readme_runs_from_top_to_bottom(reader: Path) -> None:
    for language, text in BLOCKS:
        if language == "bash":
            for command in commands_of(text, reader):
                rule_for(command)(command)
        elif language == "python":
            exec(compile(text, "README.md", "exec"), {})
    assert (reader / "saves/mine/run.json").exists() and (reader / "saves/second/run.json").exists()
    assert (reader / "saves/pipeline/merged/model.safetensors").exists()


@pytest.mark.parametrize("words", ["pip install dataflex", "make everything", "env dataflex dynamic run.yaml"])
def test_a_command_without_a_rule_fails(words: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule"):
        rule_for(Command(tuple(words.split()), {}))
