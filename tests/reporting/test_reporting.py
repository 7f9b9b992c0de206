"""The page of a run, a comparison and a score file: its numbers, its structure, and what a browser makes of it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import dataflex
from dataflex.config import RunConfig
from dataflex.errors import UsageError
from dataflex.influence.score_table import read_score_table
from dataflex.influence.scores import Scores
from dataflex.reporting.page import page_of
from dataflex.reporting.plots import picked_shares
from dataflex.reporting.scores import OTHERS, best_and_worst, figures_of_scores
from dataflex.reporting.verdicts import verdict_of_comparison
from dataflex.training.schedule import dynamic_schedule, scheduled_rows

SCRIPT = "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
VOID = ("meta", "img", "br", "path", "use", "rect")


@pytest.fixture(scope="module")
def config(tiny_run: dict, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Rows some of which hold markup, under names that hold markup as well."""
    folder = tmp_path_factory.mktemp("data")
    records = json.loads((data_dir / "alpaca_en_demo.json").read_text())[:24]
    for record in records:
        record["instruction"] = f"{SCRIPT} {record['instruction']}"
    (folder / "rows.json").write_text(json.dumps(records))
    entries = {"a<b>&$ ^{$": {"file_name": "rows.json"}, "identity": {"file_name": str(data_dir / "identity.json")}}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return dataflex.load_config(options={**tiny_run, "dataset": "a<b>&$ ^{$,identity", "dataset_dir": str(folder)})


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an evaluation during training."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return dataflex.dynamic(config.changed(output_dir=str(folder), eval_strategy="steps", eval_steps=3))


class _Structure(html.parser.HTMLParser):
    """Tags in the order in which they open, and whether all of them close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_a_run_writes_its_page_and_numbers(config: RunConfig, run: Path) -> None:
    facts = json.loads((run / "report.json").read_text())
    record = json.loads((run / "run.json").read_text())
    scores, tokens = read_score_table(run / "selections" / "step-5.parquet")
    last = facts["selections"][-1]
    picked = [
        [json.loads(line)["row"] for line in (run / f"selections/step-{step}.jsonl").read_text().splitlines()]
        for step in (3, 5)
    ]
    assert [one["step"] for one in facts["selections"]] == [3, 5]
    assert facts["overlap"][1][0] == len({*picked[0]} & {*picked[1]}) / 4
    assert last["quantiles"]["0.5"] == pytest.approx(np.median(scores.score))
    assert last["length_correlation"] == pytest.approx(stats.spearmanr(scores.score, tokens).statistic)
    assert last["picked_tokens"] == pytest.approx(tokens[np.isin(scores.row, picked[1])].mean())
    assert sum(map(sum, last["histogram"]["datasets"].values())) == 48
    best = scores.row[np.argsort(-scores.score, kind="stable")][:10].tolist()
    assert [row["row"] for row in facts["best"]] == best
    assert [row["row"] for row in facts["worst"]] == scores.row[np.argsort(scores.score, kind="stable")][:10].tolist()
    assert facts["eval_loss"] == {"rows": record["eval_rows"], **record["eval_loss"]}
    assert [point["step"] for point in facts["eval_losses"]] == [3, 6, 7]
    assert len(facts["loss"]) == 7 and facts["fingerprints"] == record["origin"]["content"]


def test_forgetting_is_measured_on_rows_that_were_not_trained_on(config: RunConfig, run: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "report.json").read_text())
    kept = json.loads((run / "run.json").read_text())["losses_of_others"]
    examples = dataflex.load_examples(config)
    drawn = sorted(np.random.default_rng((config.seed, 4)).permutation(48)[:32].tolist())
    chosen: list[dict[str, float]] = []
    for name, adapters in (("before", None), ("after", [str(run)])):
        rows = tmp_path / f"{name}.jsonl"
        dataflex.evaluate(
            config.changed(
                dataset=None, eval_dataset=config.dataset, adapter_name_or_path=adapters, max_new_tokens=0,
                output=str(tmp_path / f"{name}.json"), rows=str(rows),
            )
        )  # fmt: skip
        losses = {json.loads(line)["row"]: json.loads(line)["loss"] for line in rows.read_text().splitlines()}
        chosen.append(losses)
    np.testing.assert_allclose(kept, [chosen[0][examples[index].row] for index in drawn], rtol=1e-4)
    rows = [example.row for example in examples]
    made = {
        step: [
            rows.index(json.loads(line)["row"])
            for line in (run / f"selections/step-{step}.jsonl").read_text().splitlines()
        ]
        for step in (3, 5)
    }
    schedule = dynamic_schedule(config)
    trained = {index for step in range(7) for index in scheduled_rows(schedule, step, 48, config.seed, made)}
    left = [rows[index] for index in drawn if index not in trained]
    assert facts["others"]["rows"] == len(left) < 32
    for name, one in zip(("before", "after"), chosen, strict=True):
        assert facts["others"][name] == pytest.approx(np.mean([one[row] for row in left]), rel=1e-4)


def test_the_page_is_one_whole_file_that_runs_nothing(run: Path) -> None:
    page = (run / "report.html").read_text()
    structure = _Structure(page)
    assert structure.open == []
    assert structure.tags.count("svg") == 4 and structure.tags.count("details") == 21
    assert "script" not in structure.tags and "img" not in structure.tags and "link" not in structure.tags
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "&lt;script&gt;document.title" in page and "a&lt;b&gt;&amp;$ ^{$" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_within_its_width_and_runs_nothing(run: Path, width: int, tmp_path: Path) -> None:
    """The page in a frame of that width, whose parent reads how wide the page came out."""
    shutil.copy(run / "report.html", tmp_path / "report.html")
    reads = (
        "const page = frame.contentDocument; out.textContent = ['wide', page.documentElement.scrollWidth, page.title, "
        "[...page.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().width > width / 5)].join('|')"
    )
    (tmp_path / "frame.html").write_text(
        f"<iframe id=frame src=report.html width={width} height=900 style='border:0'></iframe><p id=out></p>"
        f"<script>const width = {width}; frame.onload = () => {{ {reads} }}</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    more = ["--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom", str(tmp_path / "frame.html")]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)
    found = re.search(r">wide\|(\d+)\|([^|]*)\|(\w+)<", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr
    assert width - 20 <= int(found[1]) <= width  # nothing reaches beyond the frame, which has a scroll bar
    assert found[2] == f"less: {run}" and found[3] == "true"


def test_a_score_file_and_its_data_make_a_page(config: RunConfig, tmp_path: Path, run_cli) -> None:
    scores = tmp_path / "scores.jsonl"
    dataflex.score(config.changed(component_name="length", selector="length", output=str(scores)))
    with pytest.raises(UsageError, match="needs data"):
        dataflex.report(dataflex.load_config(), scores)
    done = run_cli("report", scores, "--data", "a<b>&$ ^{$,identity", f"dataset_dir={config.dataset_dir}", "--json")
    page = tmp_path / "scores.report.html"
    assert json.loads(done.stdout)["written"] == [str(page), str(page.with_suffix(".json"))]
    facts = json.loads(page.with_suffix(".json").read_text())
    assert facts["selections"][0]["length_correlation"] == pytest.approx(1.0)
    assert _Structure(page.read_text()).open == []


def test_against_another_run_it_says_which_won(config: RunConfig, run: Path, tmp_path: Path) -> None:
    other = dataflex.dynamic(
        config.changed(output_dir=str(tmp_path / "random"), component_name="random", selector="random", report=False)
    )
    assert not (other / "report.html").exists()
    dataflex.report(config, run, against=other)
    facts = json.loads((run / "report.json").read_text())
    ours, theirs = (json.loads((folder / "run.json").read_text())["eval_loss"]["after"] for folder in (run, other))
    assert facts["verdict"].startswith("less won" if ours < theirs else "random won")
    assert facts["verdict"] in (run / "report.html").read_text()
    elsewhere = config.changed(output_dir=str(tmp_path / "else"), component_name="random", selector="random")
    dataflex.dynamic(elsewhere.changed(eval_dataset=["identity"], max_samples=23))
    with pytest.raises(UsageError, match="differ in eval_dataset"):
        dataflex.report(config, run, against=tmp_path / "else")


def test_a_run_killed_before_its_page_gets_it_when_run_again(config: RunConfig, run: Path) -> None:
    wanted = (run / "report.json").read_text()
    for name in ("report.html", "report.json"):
        (run / name).unlink()
    dataflex.dynamic(config.changed(output_dir=str(run), eval_strategy="steps", eval_steps=3))
    again, before = json.loads((run / "report.json").read_text()), json.loads(wanted)
    for facts in (again, before):
        facts.pop("against", None), facts.pop("verdict", None)
    assert again == before


def test_a_run_that_logged_nothing_has_a_page(config: RunConfig, tmp_path: Path) -> None:
    """Shorter than logging_steps, and without a selection."""
    short = config.changed(output_dir=str(tmp_path / "out"), logging_steps=100, max_steps=2)
    folder = dataflex.dynamic(short)
    assert not (folder / "trainer_log.jsonl").exists()
    assert json.loads((folder / "report.json").read_text())["loss"] == []
    assert _Structure((folder / "report.html").read_text()).open == []


def test_what_has_no_page_is_refused(config: RunConfig, tmp_path: Path) -> None:
    for target, said in ((tmp_path / "gone", "no such file or folder"), (tmp_path, "no run.json")):
        with pytest.raises(UsageError, match=said):
            dataflex.report(config, target)
    folder = dataflex.train(config.changed(output_dir=str(tmp_path / "train"), dataset=["identity"], max_steps=1))
    with pytest.raises(UsageError, match="is a run of train"):
        dataflex.report(config, folder)


def comparison(arms: int) -> dict[str, Any]:
    names = ["untouched", "random", *(f"arm-{number}" for number in range(arms))]
    figures = {"difference": -0.1, "low": -0.2, "high": -0.01}
    run = {"seed": 1, "rows": 5, "tokens": 50, "picked": {"data": 5}, "loss": 2.0, "seconds": 1.0, "folder": "x"}
    return {
        "command": "compare", "name": "out", "by": "rows", "budgets": [0.1, 0.2], "seeds": [1, 2], "arms": names,
        "held_out": {"datasets": ["held"], "rows": 4}, "pool": {"rows": 50, "tokens": 500, "datasets": {"data": 50}},
        "untouched": {"loss": 2.5}, "device": "a device", "settings": {}, "fingerprints": {}, "versions": {},
        "runs": [{"arm": name, "budget": share, **run} for name in names[1:] for share in (0.1, 0.2)],
        "summary": [
            {"arm": name, "budget": share, "loss": 2.0, **(figures if name != "random" else {})}
            for share in (0.1, 0.2) for name in names
        ],
        "agreement": [{"a": "random", "b": "arm-0", "budget": 0.1, "share": 0.5}], "seconds": {"training": 3.0},
        "deciles": {"arm-0": {"loss": list(range(10)), "spearman": 1.0, "by_seed": [1.0, None]}},
        "lds": {"arm-0": [0.5, None]},
    }  # fmt: skip


@pytest.mark.parametrize("arms", [1, 12])
def test_a_comparison_has_its_arms_with_intervals(arms: int) -> None:
    facts = comparison(arms)
    page = page_of({**facts, "verdict": verdict_of_comparison(facts)})
    structure = _Structure(page)
    assert structure.open == [] and structure.tags.count("svg") == 7
    assert "-0.2000 to -0.0100" in page
    assert "At a budget of 0.1, arm-0 does best and beats random rows" in page
    lost = {**facts, "summary": [{**one, "low": 0.01, "high": 0.2} for one in facts["summary"]]}
    lost["summary"] = [
        {k: v for k, v in one.items() if one["arm"] != "random" or k not in ("low", "high")} for one in lost["summary"]
    ]
    assert "loses to random rows" in verdict_of_comparison(lost)


def test_more_datasets_than_colours_are_counted_together() -> None:
    svg = picked_shares([{f"data-{number}": number + 1 for number in range(14)}], ["pool"], "selection at step")
    assert OTHERS in svg and "data-7<" in svg and "data-8<" not in svg


def test_figures_of_a_hundred_thousand_rows_in_many_datasets() -> None:
    generator = np.random.default_rng(0)
    count = 100_000
    score = generator.normal(size=count)
    score[:5] = np.nan
    names = [f"data-{number % 12}" for number in range(count)]
    scores = Scores(np.arange(count), score, {}, names)
    found = figures_of_scores(scores, generator.integers(1, 100, count))
    assert found["scored"] == count - 5
    assert len(found["histogram"]["datasets"]) == 8 and OTHERS in found["histogram"]["datasets"]
    assert sum(map(sum, found["histogram"]["datasets"].values())) == count - 5
    best, worst = best_and_worst(scores)
    assert np.isfinite(score[best + worst]).all() and score[best[0]] == np.nanmax(score)
    assert not {*best} & {*worst}
    few = Scores(np.arange(3), np.array([1.0, 2.0, 3.0]), {}, None)
    assert best_and_worst(few) == ([2], [0])
