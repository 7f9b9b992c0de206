"""What is printed while work goes on, with a terminal and without, and how options take their values."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console as RichConsole

from dataflex.commands import console as printed
from dataflex.commands.compare import show_comparison
from dataflex.commands.console import Console
from dataflex.commands.summaries import histogram, show_scores
from dataflex.influence.scores import Scores


def test_without_a_terminal_a_long_task_says_where_it_is(monkeypatch, capfd) -> None:
    monkeypatch.setattr(printed, "EVERY", 0.0)
    with Console().task("training", 4, "steps") as task:
        task.advance(loss=2.5)
        task.advance()
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"training: 1/4 steps, [\d.]+ (steps/s|s/step), 0:00:0\d left", lines[0])
    assert lines[1].startswith("training: 2/4 steps")
    monkeypatch.setattr(printed, "EVERY", 30.0)
    with Console().task("training", 4, "steps") as task:
        task.advance()
    assert capfd.readouterr().err == ""


def test_a_terminal_that_moves_no_cursor_gets_lines_as_well(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(printed, "EVERY", 0.0)
    shown, said = Console(), io.StringIO()
    shown.err = RichConsole(force_terminal=True, width=80, file=said)
    with shown.task("training", 4, "steps") as task:
        task.advance()
    assert said.getvalue().startswith("training: 1/4 steps") and "\x1b" not in said.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_is_one_line(width: int, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = Console()
    shown.err = RichConsole(force_terminal=True, width=width, record=True, file=io.StringIO())
    with shown.task("train gradients", 123456, "rows") as task:
        task.advance(9999, loss=1.2345, eval_loss=2.3456)
        lines = shown.err.render_lines(shown._view())
        text = "".join(segment.text for segment in lines[0])
    assert len(lines) == 1 and len(text) == width
    assert "9999/123456 rows" in text and "left" in text


def test_a_bar_moves_before_its_first_unit_is_done(monkeypatch) -> None:
    """A first batch may take a minute: the time so far stands where the time left will."""
    monkeypatch.setenv("TERM", "xterm")
    shown = Console()
    shown.err = RichConsole(force_terminal=True, width=80, file=io.StringIO())
    with shown.task("train gradients", 24, "rows"):
        [line] = shown.err.render_lines(shown._view())
    assert "0:00:00 so far" in "".join(segment.text for segment in line)


def test_something_moves_between_tasks_until_the_result_is_printed(monkeypatch, capfd) -> None:
    """A model that loads for minutes shows the time since the last line; below the result nothing is drawn."""
    monkeypatch.setenv("TERM", "xterm")
    shown, said = Console(), io.StringIO()
    shown.err = RichConsole(force_terminal=True, width=80, file=said)
    with shown.alive():
        shown.say("loading")
        monkeypatch.setattr(shown, "_said", shown._said - 65)
        time.sleep(0.3)
        assert "0:01:05" in said.getvalue()
        shown.result([Path("out")], {})
        assert capfd.readouterr().out == "out\n"
        drawn = said.getvalue()
        assert drawn.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the line is gone
        time.sleep(0.3)
    assert said.getvalue() == drawn


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dataflex dyn", "dynamic"),
        ("dataflex train temp", "template="),
        ("dataflex train template=ll", "template=llama2 template=llama3"),
        ("dataflex train --template qwen3_", "qwen3_nothink"),
        ("dataflex train --dataset alpaca,id", "alpaca,identity"),
        ("dataflex grads --grad", "--gradient-type"),
        ("dataflex grads gradient_type=s", "gradient_type=sgd gradient_type=sign"),
        ("dataflex train bf16=", "bf16=true bf16=false"),
        ("dataflex train ru", "run.yaml run_name="),
        ("dataflex train no_key=", ""),
    ],
)
def test_a_shell_is_offered_the_rest_of_a_word(typed: str, offered: str, bench: Path) -> None:
    words = {"_DATAFLEX_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [str(Path(sys.executable).parent / "dataflex")]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, cwd=bench)
    assert done.stdout.split() == offered.split()


def test_a_small_histogram() -> None:
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    assert histogram(np.array([0.5] * 16 + [1.5] * 8 + [2.5]), edges) == "█▄▁"
    assert histogram(np.array([2.5]), edges) == "  █"


@pytest.mark.parametrize("width", [80, 120])
def test_a_histogram_is_never_broken(width: int) -> None:
    generator = np.random.default_rng(0)
    names = ["glaive_toolcall_en_demo", "alpaca_en_demo"]
    scores = Scores(np.arange(40), generator.normal(size=40), {}, names * 20)
    shown = Console()
    shown.err = RichConsole(width=width, file=io.StringIO())
    show_scores(shown, "selected", scores, chosen=[1, 2, 3])
    said = shown.err.file.getvalue()
    edges = np.histogram_bin_edges(scores.score, 8 if width == 80 else 16)
    for place in (0, 1):
        assert f"  {histogram(scores.score[place::2], edges)}".rstrip() in said
    assert max(map(len, said.splitlines())) <= width


def test_a_comparison_is_a_table_a_budget_whose_lines_fit_80_columns() -> None:
    arms = ["random", "length", "less-contrast-rds"]
    told = {"difference": -0.0093, "low": -0.02351, "high": 0.00534}
    summary = [
        {"budget": budget, "arm": arm, "loss": 1.77923, **(told if arm != "random" else {})}
        for budget in (0.05, 0.2)
        for arm in arms
    ]
    found = {"budgets": [0.05, 0.2], "by": "tokens", "seeds": [42, 43], "held_out": {"rows": 24}, "verdict": "It won."}
    shown, said = Console(), io.StringIO()
    shown.err = RichConsole(width=80, file=said)
    show_comparison(shown, {**found, "summary": summary})
    lines = [line.rstrip() for line in said.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    for budget in ("0.05", "0.2"):
        assert f"budget {budget} of the tokens: loss on 24 held-out rows, seeds 42, 43" in lines
    line = r" less-contrast-rds +1\.7792 +-0\.0093 +-0\.0235 to \+0\.0053 +not told apart"
    assert sum(re.fullmatch(line, found) is not None for found in lines) == 2


def test_scores_are_shown_by_dataset_with_the_best_rows(bench: Path, cli) -> None:
    said = cli("inspect", "scores.jsonl").stderr
    select = ("select", "run.yaml", "--scores", "scores.jsonl", "--count", 3, "-o", "three.jsonl", "--overwrite")
    taken = cli(*select).stderr
    plain = cli(*select, "plain=true").stderr
    for text in (said, taken, plain):
        assert re.search(r"alpaca +6 ", text) and re.search(r"identity +6 ", text) and re.search(r"[▁-█]", text)
    order = [json.loads(line) for line in (bench / "scores.jsonl").read_text().splitlines()]
    best = [line["row"] for line in sorted(order, key=lambda line: (-line["score"], line["row"]))]
    for text, rows in ((said, best[:5]), (taken, best[:3]), (plain, best[:3])):
        shown = re.findall(r"^ +(\d+) ", text[text.index("the best rows") :], flags=re.MULTILINE)
        assert [int(row) for row in shown] == rows
    assert "selected 3 of 12 rows" in taken


def test_a_selection_is_shown_as_text(bench: Path, cli) -> None:
    """By `select` and by `inspect`: its best and its last rows, none twice, each under its number and its score."""
    taken = cli("select", "run.yaml", "--scores", "scores.jsonl", "--count", 8, "-o", "eight.jsonl").stderr
    lines = [json.loads(line) for line in (bench / "eight.jsonl").read_text().splitlines()]
    inspected = cli("inspect", "eight.jsonl").stderr
    for said, head, foot in (
        (taken, "the best rows", "the last rows that were selected"),
        (inspected, "the first rows", "the last rows"),
    ):
        best, last = said[said.index(head) :].split(foot)
        for text, expected in ((best, lines[:5]), (last, lines[5:])):
            found = re.findall(r"^ +(\d+) +(-?\d\.\d{4})  (.*)$", text, flags=re.MULTILINE)
            assert [(int(row), score) for row, score, _ in found] == [
                (line["dataflex"]["row"], f"{line['dataflex']['score']:.4f}") for line in expected
            ]
            for (_, _, shown), line in zip(found, expected, strict=True):
                assert shown.startswith(" ".join(line["instruction"].split())[:15])


def test_what_is_shown_of_rows_undoes_nothing(bench: Path, cli) -> None:
    """Scores whose data is not there any more, and a subset in a file of any name: both are written, and told."""
    scored = cli("score", "run.yaml", "--train", "train.h5", "--eval", "eval.h5", "-o", "found.jsonl", "dataset=gone")
    assert (scored.exit_code, scored.stdout) == (0, "found.jsonl\n"), scored.stderr
    assert "no row is shown as text" in scored.stderr and "the best rows" in scored.stderr
    for name in ("subset", "alpaca", "rows.csv"):  # one is a dataset's name
        taken = cli("select", "run.yaml", "--scores", "scores.jsonl", "--count", 3, "-o", name)
        assert (taken.exit_code, taken.stdout) == (0, f"{name}\n"), taken.stderr
        assert "the best rows" in taken.stderr


def test_the_table_of_an_evaluation_fits_80_columns() -> None:
    """Numbers of usual length, under the names that datasets have: none is cut."""
    shown, said = Console(), io.StringIO()
    shown.err = RichConsole(width=80, file=said)
    names = ["rows", "tokens", "loss", "token loss", "perplexity", "exact", "normalised", "math"]
    numbers = [1319, 312345, 1.234567, 0.987654, 3.43712, 0.123456, 0.234567, 0.345678]
    shown.table("held-out rows", ["", *names], [[name, *numbers] for name in ("glaive_toolcall_en_demo", "all")])
    text = said.getvalue()
    assert "…" not in text and text.count("312345") == 2 and max(map(len, text.splitlines())) <= 80


def test_options_take_what_keys_take(bench: Path, cli) -> None:
    taken = cli("select", "run.yaml", "--scores", "scores.jsonl", "--top", "50%", "-o", "half.jsonl", "--json")
    assert taken.exit_code == 0, taken.stderr
    rows = len((bench / "scores.jsonl").read_text().splitlines())
    assert len((bench / "half.jsonl").read_text().splitlines()) == rows // 2
    planned = cli("dynamic", "run.yaml", "--proj-dim", "null", "output_dir=out", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert "store_bytes" not in json.loads(planned.stdout)["sizes"]
    for wrong in ("5%%", "many", "500%"):
        refused = cli("select", "run.yaml", "--scores", "scores.jsonl", "--top", wrong, "-o", "x.jsonl")
        assert refused.exit_code == 2 and "top" in refused.stderr
