from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from dataflex.commands.console import Console
from dataflex.commands.planned import show_data
from dataflex.commands.summaries import show_run, show_subset

DATA = {
    **{"rows": 5, "kept": 3, "dropped": {"no response": 2}, "first_dropped": {"no response": 4}},
    **{"truncated": 1, "lost_end": 1, "tokens": 60, "supervised_tokens": 12, "lengths": {"min": 10, "max": 30}},
    "example": {
        "row": 7,
        "dataset": "d",
        "spans": [{"text": "[b]asked[/b]", "supervised": False}, {"text": "learned", "supervised": True}],
    },
}


@pytest.fixture(autouse=True)
def row_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("train.h5", "store"),
        ("scores.jsonl", "scores"),
        ("data/alpaca.json", "dataset"),
        ("alpaca,identity", "dataset"),
        ("warmup/checkpoint-4", "checkpoint"),
        ("warmup", "output directory"),
    ],
)
def test_each_kind_is_told(target: str, kind: str, bench: Path, cli, tree) -> None:
    before = tree(bench)
    result = cli("inspect", target)
    assert (result.exit_code, result.stdout) == (0, f"{target}: {kind}, whole\n"), result.stderr
    assert not re.search(r"\d\.\d{6}", result.stderr), "numbers are rounded"
    found = json.loads(cli("inspect", target, "--json", "-q").stdout)
    assert (found["command"], found["kind"], found["whole"]) == ("inspect", kind, True)
    assert tree(bench) == before


def test_of_a_store_the_terminal_shows_what_is_not_at_its_default(bench: Path, cli) -> None:
    result = cli("inspect", "train.h5")
    lines = [line.split("  ")[0].strip() for line in result.stderr.splitlines()]
    assert {"rows", "dimensions", "gradient type", "projector", "template"} <= set(lines)
    assert not {"quantization type", "mask history", "marginal", "proj seed"} & set(lines)
    facts = json.loads(cli("inspect", "train.h5", "--json", "-q").stdout)["facts"]
    assert {"quantization_type", "mask_history", "marginal", "proj_seed"} <= set(facts)
    assert f"{facts['base_model'][:12]}…" in result.stderr and facts["base_model"] not in result.stderr


def test_a_dataset_with_a_config(bench: Path, cli, row_cache: Path) -> None:
    result = cli("inspect", "alpaca", "run.yaml", "cutoff_len=64", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "supervised tokens" in result.stderr and "⟦" in result.stderr
    assert not row_cache.exists()
    found = json.loads(cli("inspect", "alpaca", "run.yaml", "cutoff_len=64", "--json").stdout)
    assert (found["data"]["rows"], found["data"]["longest"]) == (6, 64)
    assert found["example"]["row"] == 0
    assert row_cache.exists()


def test_what_is_wrong_is_said_and_exits_as_usage(bench: Path, cli) -> None:
    assert cli("inspect", "nothing.jsonl").exit_code == 2
    (bench / "warmup" / "checkpoint-4" / "moments.safetensors").unlink()
    result = cli("inspect", "warmup/checkpoint-4")
    assert (result.exit_code, result.stdout) == (0, "warmup/checkpoint-4: checkpoint, not whole\n")
    assert "warning: moments.safetensors is missing" in result.stderr


def test_scores_are_shown_with_their_rows_and_drawn(bench: Path, cli) -> None:
    result = cli("inspect", "scores.jsonl", "run.yaml", "--plot", "pictures/scores.png")
    assert result.exit_code == 0, result.stderr
    assert Path("pictures/scores.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["score"], -line["row"]))
    records = [*json.loads(Path("data/alpaca.json").read_text()), *json.loads(Path("data/identity.json").read_text())]
    record = records[best["row"]]
    said = result.stderr[result.stderr.rindex("the best rows") : result.stderr.rindex("the worst rows")]
    assert f"{best['row']}  {best['score']:7.4f}  {record['instruction'].split()[0]}" in said.splitlines()[1]
    assert max(map(len, said.splitlines())) <= 80


def test_rows_of_other_data_are_not_shown_as_those_that_were_scored(bench: Path, cli) -> None:
    result = cli("inspect", "scores.jsonl", "run.yaml", "--data", "identity,alpaca")
    assert result.exit_code == 0, result.stderr
    assert "no row is shown as text: the scores were made from other data" in result.stderr
    refused = cli("report", "scores.jsonl", "run.yaml", "--data", "identity,alpaca")
    assert refused.exit_code == 2 and "made from other data" in refused.stderr
    assert not Path("scores.report.html").exists()


@pytest.mark.parametrize(
    ("target", "plot", "message"),
    [("scores.jsonl", "scores.xyz", "no format of that name"), ("train.h5", "rows.png", "is a store")],
)
def test_what_cannot_be_drawn_is_refused(target: str, plot: str, message: str, bench: Path, cli) -> None:
    result = cli("inspect", target, "--plot", plot)
    assert result.exit_code == 2 and message in result.stderr
    assert not Path(plot).exists()


@pytest.mark.parametrize("coloured", [True, False])
def test_learned_text_stands_out(coloured: bool) -> None:
    console = Console()
    console.err = RichConsole(
        force_terminal=coloured, color_system="standard" if coloured else None, highlight=False, width=80
    )
    with console.err.capture() as captured:
        show_data(console, {"train": DATA})
    shown = captured.get()
    assert "no response" in shown and "row 7 of d" in shown and "[b]asked[/b]" in shown
    assert ("\x1b[32mlearned" in shown, "⟦learned⟧" in shown) == (coloured, not coloured)


def test_a_dry_run_shows_the_data(bench: Path, cli, row_cache: Path) -> None:
    result = cli("train", "run.yaml", "output_dir=out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "length 90%" in result.stderr and "train: row 0 of alpaca" in result.stderr
    assert not row_cache.exists()
    found = json.loads(cli("train", "run.yaml", "output_dir=out", "--dry-run", "--json").stdout)
    assert found["data"]["train"]["example"]["spans"][0]["supervised"] is False


def test_a_run_is_told_by_inspect_as_by_dynamic(bench: Path, cli) -> None:
    """And where it cannot be: a run that has not ended, or a record that lacks what the tables show."""
    ran = cli("dynamic", "run.yaml", "output_dir=out")
    assert ran.exit_code == 0, ran.stderr
    tables = ran.stderr[ran.stderr.index("What was picked") : ran.stderr.index("next: ")]
    assert re.search(r"picked at step 4 +4 ", tables) and re.search(r"loss on 4 eval rows +\d\.\d{4} before", tables)
    assert re.search(r"on \d untrained rows +\d\.\d{4} before, \d\.\d{4} after", tables)
    told = cli("inspect", "out").stderr
    assert tables.split() == told[told.index("What was picked") :].split()
    assert "rows per step" not in told  # as a bare fact

    record = json.loads((bench / "out/run.json").read_text())
    without_loss = {**record, "eval_loss": {"before": 1.5, "after": None}, "others": None}
    (bench / "out/run.json").write_text(json.dumps(without_loss))
    assert "1.5000 before, not finite after" in cli("inspect", "out").stderr
    for changed in ({**record, "finished": False}, {key: value for key, value in record.items() if key != "pool"}):
        (bench / "out/run.json").write_text(json.dumps(changed))
        found = cli("inspect", "out")
        assert found.exit_code == 0, found.stderr
        assert "What was picked" not in found.stderr and "rows per step" in found.stderr


def test_many_selections_are_cut_in_the_middle(tmp_path: Path) -> None:
    run = {
        **{"rows": 9, "pool": {"a": 9}, "steps": 40, "rows_per_step": 1, "eval_rows": 2, "seconds": {"training": 1.0}},
        "eval_loss": {"before": 1.0, "after": 0.5},
        "selections": [{"step": step, "rows": 1, "picked": {"a": 1}} for step in range(0, 40, 2)],
    }
    console = Console()
    console.err = RichConsole(width=80)
    with console.err.capture() as captured:
        show_run(console, tmp_path, run)
    lines = [line.split("  ")[0].strip() for line in captured.get().splitlines()]
    picked = [f"picked at step {step}" for step in range(0, 22, 2)]
    assert [line for line in lines if "step " in line or "more" in line] == [*picked, "… 8 more", "picked at step 38"]


def test_a_row_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Its control characters are shown as pictures, wherever text of rows is printed."""
    console, wicked = Console(), "a\x1b[2Jb\x07c\x9bd\x7fe"
    console.err = RichConsole(width=80, force_terminal=True, color_system="standard", highlight=False)
    record = {"instruction": wicked, "input": "", "output": "ok", "dataflex": {"row": 1, "score": 0.5}}
    span = {"text": wicked, "supervised": True}
    with console.err.capture() as captured:
        show_subset(console, tmp_path / "s.jsonl", [record], ("first", "last"))
        show_data(console, {"train": {**DATA, "example": {**DATA["example"], "spans": [span]}}})
        console.say(wicked)
        console.warning(wicked)
        console.facts("facts", {"name": wicked})
    shown = captured.get()
    assert shown.count("a␛[2Jb␇c\ufffdd␡e") == 5
    assert not re.search("\x1b\\[2J|[\x07\x7f-\x9f]", shown)
