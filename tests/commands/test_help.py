"""What `--help` shows: one screen a command, with choices and defaults; `--help-all` shows every key."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from importlib import import_module
from typing import get_type_hints

import pytest

from dataflex.commands.app import COMMANDS
from dataflex.commands.help import HELP
from dataflex.config import MARKS, choices_of


def names_in(said: str) -> list[str]:
    """Options and keys that have a line of their own, an option's short form included."""
    found = re.findall(r"^  ([^\s,]+(?:, [^\s,]+)*)", said, flags=re.MULTILINE)
    return [name for names in found for name in names.split(", ")]


def flags_of(command: str) -> list[str]:
    """Every flag that the signature of a command declares."""
    hints = get_type_hints(getattr(import_module(f"dataflex.commands.{command}"), command), include_extras=True)
    del hints["return"]
    return [flag for hint in hints.values() for flag in hint.__metadata__[0].param_decls or ()]


def test_the_programs_help_fits_a_screen(run_cli) -> None:
    lines = run_cli("--help").stdout.splitlines()
    assert len([line for line in lines if line.strip()]) <= 40 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_fits_a_screen_and_names_every_option(command: str, cli) -> None:
    shown = cli(command, "--help")
    assert shown.exit_code == 0
    *body, example = shown.stdout.rstrip().splitlines()
    assert len(body) < 40 and max(map(len, body)) <= 80
    assert example.startswith(f"Example: dataflex {command} ")
    names = names_in("\n".join(body))
    assert set(flags_of(command)) <= set(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_all_of_the_help_has_every_key_that_the_command_uses(command: str, cli) -> None:
    names = names_in(cli(command, "--help-all").stdout)
    used = [key for key, mark in MARKS.items() if command in mark.users and key != "training_arguments"]
    assert [key for key in used if key not in names] == []
    assert set(names_in(cli(command, "--help").stdout)) <= {*names, *HELP}


def test_options_show_their_choices_and_defaults(cli) -> None:
    said = " ".join(cli("grads", "--help").stdout.split())
    assert "[adam, sgd, sign; default adam]" in said and "[default 8192]" in said
    assert "less-contrast-rds; default less]" in " ".join(cli("score", "--help").stdout.split())
    assert choices_of("by") == ("rows", "tokens") and choices_of("quantization_bit") == ("4", "8")
    assert choices_of("learning_rate") == () and choices_of("output_dir") == ()


@pytest.mark.parametrize("words", [("--learning-rate", "1e-4"), ("--learning-rate=1e-4",), ("--learning_rate", "1e-4")])
def test_a_key_written_as_an_option_is_shown_as_a_key(words: tuple[str, ...], cli) -> None:
    refused = cli("train", *words)
    assert refused.exit_code == 2 and "learning_rate=1e-4" in refused.stderr


def test_keys_are_wrapped_between_words_on_a_terminal_and_a_line_each_elsewhere() -> None:
    command = [sys.executable, "-m", "dataflex", "keys", "selectors"]  # its help has names with dashes
    whole = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for width in range(56, 72, 5):
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stdout=theirs, env={**os.environ, "COLUMNS": str(width)}) as running:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError), open(ours, "rb", closefd=True) as terminal:  # its end is an error
                while part := terminal.read1():
                    shown += part
            assert running.wait(timeout=60) == 0
        assert max(map(len, shown.decode().splitlines())) <= width
        assert shown.decode().split() == whole.split()
    assert max(map(len, whole.splitlines())) > 72
