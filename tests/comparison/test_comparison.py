"""A comparison against its commands called one by one; its arithmetic against slow ways; killed, extended, shared."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import dataflex
from dataflex.comparison.arms import all_is_affordable, random_halves, rows_of_budget, tenths
from dataflex.comparison.figures import agreement, datamodeling_score, decile_test, paired_difference
from dataflex.config import RunConfig, save_config
from dataflex.config_file import with_component
from dataflex.errors import UsageError
from dataflex.influence.score_file import read_scores
from dataflex.influence.scores import ranking
from dataflex.progress import Interrupted, SilentTask

SEEDS = [42, 43]


@pytest.fixture(scope="module")
def config(tiny_run: dict, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    held_out = tmp_path_factory.mktemp("held out") / "rows.jsonl"
    rows = json.loads((data_dir / "identity.json").read_text())[-9:-4]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"held_out": str(held_out), "selectors": "less,rds", "budget": 0.25, "seeds": 2, "warmup_step": 2}
    return dataflex.load_config(options={**tiny_run, "dataset": "alpaca_en_demo,identity", **options})


@pytest.fixture(scope="module")
def made(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataflex.compare(config.changed(output=str(tmp_path_factory.mktemp("compared") / "out")))


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def losses_of(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_every_number_is_that_of_the_commands_called_one_by_one(config: RunConfig, made: Path, tmp_path: Path) -> None:
    """The arm less with the second seed: warm-up, exact scores, the best quarter of the rows, training, evaluation."""
    seed = SEEDS[1]
    plain = config.changed(seed=seed)
    checkpoint = dataflex.warmup(plain.changed(output_dir=str(tmp_path / "warmup")))
    scores = tmp_path / "scores.jsonl"
    dataflex.score(plain.changed(exact=True, checkpoint=[str(checkpoint)], output=str(scores)))
    subset = tmp_path / "subset.jsonl"
    dataflex.select(plain.changed(scores=str(scores), top=0.25, output=str(subset)))
    run = dataflex.train(
        plain.changed(dataset=[str(subset)], eval_dataset=None, max_samples=None, output_dir=str(tmp_path / "run"))
    )
    rows = tmp_path / "rows.jsonl"
    evaluated = plain.changed(adapter_name_or_path=[str(run)], output=str(tmp_path / "eval.json"), rows=str(rows))
    dataflex.evaluate(evaluated.changed(max_new_tokens=0))
    expected = losses_of(rows)

    np.testing.assert_allclose(losses_of(made / f"seed-{seed}/evals/less-0.25.rows.jsonl"), expected, rtol=1e-6)
    report = report_of(made)
    [found] = [run for run in report["runs"] if run["arm"] == "less" and run["seed"] == seed]
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["rows"] == 12 == sum(found["picked"].values())
    lines = [json.loads(line)["dataflex"]["row"] for line in subset.read_text().splitlines()]
    mine = (made / f"seed-{seed}/subsets/less-0.25.jsonl").read_text().splitlines()
    assert [json.loads(line)["dataflex"]["row"] for line in mine] == lines


def test_the_report_is_made_of_its_runs(config: RunConfig, made: Path) -> None:
    report = report_of(made)
    assert report["arms"] == ["untouched", "random", "length", "less", "rds", "all"]
    assert report["seeds"] == SEEDS
    by_arm = {
        name: np.array([losses_of(made / f"seed-{seed}/evals/{name}-{part}.rows.jsonl") for seed in SEEDS])
        for name, part in (*((name, "0.25") for name in ("random", "length", "less", "rds")), ("all", "1"))
    }
    by_arm["untouched"] = np.array([losses_of(made / "untouched.rows.jsonl")] * 2)
    for line in report["summary"]:
        own = by_arm[line["arm"]]
        assert line["loss"] == pytest.approx(own.mean())
        if line["arm"] == "random":
            assert "difference" not in line
        else:
            assert line["difference"] == pytest.approx((own - by_arm["random"]).mean())
            assert line["low"] <= line["difference"] <= line["high"]
    assert len({len(example.input_ids) for example in dataflex.load_examples(config)}) > 1
    lengths = [run for run in report["runs"] if run["arm"] == "length"]
    assert all(run["tokens"] >= max(r["tokens"] for r in report["runs"] if r["arm"] == "random") for run in lengths)
    assert not list(made.glob("seed-*/runs/*/checkpoint-*"))
    assert {run["rows"] for run in report["runs"] if run["arm"] == "all"} == {48}


def test_inspect_knows_a_comparison_and_whether_it_has_ended(made: Path, tmp_path: Path) -> None:
    found, report = dataflex.inspect(made), report_of(made)
    assert (found.kind, found.whole) == ("comparison", True)
    assert (found.facts["arms"], found.facts["verdict"]) == (report["arms"], report["verdict"])
    record = json.loads((made / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "finished": False}))
    assert dataflex.inspect(tmp_path).problems == ["the run has not ended; the same command goes on from where it is"]


class Kills:
    """A Progress that ends the command after some trainings, or in the middle of one."""

    def __init__(self, task: str, after: int) -> None:
        self.wanted, self.left = task, after
        self.said: list[str] = []
        self.begun_with: dict[str, int] = {}

    @contextlib.contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0, *expected: Any) -> Any:
        outer, self.begun_with[description] = self, done

        class Task(SilentTask):
            def advance(self, amount: int = 1, **shown: Any) -> None:
                if description == outer.wanted and amount:
                    outer.left -= 1
                    if outer.left == 0:
                        raise Interrupted

        yield Task()

    def say(self, message: str) -> None:
        self.said.append(message)


def figures_without_seconds(folder: Path) -> dict[str, Any]:
    report = report_of(folder)
    del report["seconds"], report["name"], report["settings"]
    for run in report["runs"]:
        del run["folder"], run["seconds"]
    return report


@pytest.fixture(scope="module")
def small(config: RunConfig) -> RunConfig:
    return config.changed(selectors=["bm25"], seeds=1, warmup_step=1)


@pytest.fixture(scope="module")
def log() -> Kills:
    return Kills("no task", after=1)


@pytest.fixture(scope="module")
def whole(small: RunConfig, log: Kills, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures_without_seconds(
        dataflex.compare(small.changed(output=str(tmp_path_factory.mktemp("whole") / "out")), log)
    )


def test_the_log_tells_of_each_training_and_nothing_twice(whole: dict[str, Any], log: Kills) -> None:
    assert len(log.said) == len(set(log.said))
    assert sum(line.startswith("held-out data: 5 of 5 rows") for line in log.said) == 1
    for run in whole["runs"]:
        part = 1 if run["arm"] == "all" else run["budget"]
        told = f"{run['arm']}-{part:g}, seed {run['seed']}: held-out loss {run['loss']:.4f} after {run['rows']} rows"
        assert told in log.said


@pytest.mark.parametrize(("task", "after"), [("trainings", 2), ("training", 5), ("held-out loss", 2)])
def test_killed_and_run_again_it_ends_alike(
    small: RunConfig, whole: dict[str, Any], tmp_path: Path, task: str, after: int
) -> None:
    again = small.changed(output=str(tmp_path / "out"))
    with pytest.raises(Interrupted):
        dataflex.compare(again, Kills(task, after))
    rest = Kills("no task", 1)
    assert figures_without_seconds(dataflex.compare(again, rest)) == whole
    if task == "trainings":
        assert rest.begun_with["trainings"] == after  # so that they say nothing of the time that the others take


def test_it_takes_further_arms_and_makes_only_those(small: RunConfig, tmp_path: Path) -> None:
    small = small.changed(output=str(tmp_path / "out"))
    dataflex.compare(small)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evals/*")}
    dataflex.compare(small.changed(selectors=["loss"], budget=[0.25, 0.1], seeds=2, lds=3))
    dataflex.compare(small.changed(deciles=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    folder = tmp_path / "out" / f"seed-{SEEDS[0]}" / "evals"
    deciles = report_of(tmp_path / "out")["deciles"]
    assert list(deciles) == ["random", "bm25"]
    for name, test in deciles.items():
        own = [np.mean(losses_of(folder / f"{name}-tenth-{place}.rows.jsonl")) for place in range(1, 11)]
        np.testing.assert_allclose(test["loss"], own)
        assert test["by_seed"] == pytest.approx([stats.spearmanr(range(10), own).statistic])

    report = report_of(dataflex.compare(small.changed(selectors=["loss"], budget=[0.25, 0.1], seeds=2, lds=3)))
    assert {(run["arm"], run["budget"], run["seed"]) for run in report["runs"] if run["arm"] == "loss"} == {
        ("loss", share, seed) for share in (0.25, 0.1) for seed in SEEDS
    }
    assert set(report["lds"]) == {"length", "loss"}

    with pytest.raises(UsageError, match=r"holds another run, which differs in .*learning_rate"):
        dataflex.compare(small.changed(learning_rate=1e-4))
    with pytest.raises(UsageError, match=r"holds another run, which differs in .*held_out"):
        dataflex.compare(small.changed(held_out=["identity"], allow_overlap=True))


def test_two_processes_come_to_what_one_does(config: RunConfig, made: Path, tmp_path: Path) -> None:
    values = config.changed(per_device_train_batch_size=1).model_dump(exclude_unset=True, mode="json")
    (tmp_path / "run.json").write_text(json.dumps(values))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "dataflex", "compare", "run.json", "--nproc", "2", "-o", "out", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found, wanted = json.loads(done.stdout), report_of(made)
    for mine, theirs in zip(found["summary"], wanted["summary"], strict=True):
        assert (mine["arm"], mine["budget"]) == (theirs["arm"], theirs["budget"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_what_would_compare_unlike_rows_is_refused(config: RunConfig, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val_size anew for each seed"):
        dataflex.compare(config.changed(eval_dataset=None, val_size=0.1, output=str(tmp_path / "out")))
    info = json.loads((data_dir / "dataset_info.json").read_text())
    info["drawn"] = {"file_name": str(data_dir / "identity.json"), "num_samples": 5}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match="num_samples draws rows anew"):
        dataflex.compare(config.changed(dataset=["drawn"], dataset_dir=str(tmp_path), output=str(tmp_path / "out")))
    with pytest.raises(UsageError, match=r"key 'selectors': no selector 'les'.*did you mean 'less'"):
        dataflex.compare(config.changed(selectors=["les"], output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- the arithmetic ------------------------------------------------------------------------------


def test_rows_of_a_budget() -> None:
    order, tokens = np.array([3, 0, 2, 1]), np.array([10, 20, 30, 40])
    assert rows_of_budget(order, tokens, 0.5, "rows").tolist() == [3, 0]
    assert rows_of_budget(order, tokens, 0.01, "rows").tolist() == [3]
    assert rows_of_budget(order, tokens, 0.5, "tokens").tolist() == [3, 0]  # 50 of 100
    assert rows_of_budget(order, tokens, 0.6, "tokens").tolist() == [3, 0]  # 50 is nearer to 60 than 80
    assert rows_of_budget(order, tokens, 0.7, "tokens").tolist() == [3, 0, 2]
    assert rows_of_budget(np.arange(100), np.ones(100), 0.29, "rows").tolist() == list(range(29))


def test_tenths_and_halves() -> None:
    parts = tenths(np.arange(23)[::-1])
    assert [len(part) for part in parts] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert np.concatenate(parts).tolist() == list(range(22, -1, -1))
    halves = random_halves(9, 3, seed=1)
    assert all(len(set(half.tolist())) == 4 for half in halves)
    assert random_halves(9, 3, seed=1)[2].tolist() == halves[2].tolist() != random_halves(9, 3, seed=2)[2].tolist()
    assert all_is_affordable([0.05, 0.2], 4) and not all_is_affordable([0.05], 4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over seeds and rows drawn from known distributions; with as few seeds as people use, it is somewhat narrow."""
    generator = np.random.default_rng(5)
    inside = []
    for _ in range(120):
        seeds, rows = 8, 60
        truth = 0.1
        pairs = truth + generator.normal(0, 0.1, (seeds, 1)) + generator.normal(0, 0.3, (1, rows))
        pairs = pairs + generator.normal(0, 0.2, (seeds, rows))
        found = paired_difference(pairs, np.zeros_like(pairs))
        assert found["difference"] == pytest.approx(pairs.mean())
        inside.append(found["low"] <= truth <= found["high"])
    assert 0.86 <= np.mean(inside) <= 1.0


def test_one_pair_that_never_changes_has_no_width() -> None:
    found = paired_difference(np.full((2, 3), 1.5), np.full((2, 3), 1.0))
    assert found == {"difference": 0.5, "low": 0.5, "high": 0.5}


def test_agreement_and_correlations_are_those_of_scipy() -> None:
    assert agreement([[1, 2, 3, 4], [5, 6]], [[4, 3, 9, 10], [5, 7]]) == pytest.approx(0.5)
    generator = np.random.default_rng(0)
    loss = generator.random((3, 10))
    found = decile_test(loss)
    assert found["spearman"] == pytest.approx(stats.spearmanr(range(10), loss.mean(axis=0)).statistic)
    assert found["by_seed"] == pytest.approx([stats.spearmanr(range(10), one).statistic for one in loss])
    scores, halves = generator.random(8), random_halves(8, 6, 0)
    scores[3] = np.nan
    after = generator.random(6)
    sums = [sum(scores[i] for i in half if i != 3) for half in halves]
    assert datamodeling_score(scores, halves, after) == pytest.approx(stats.spearmanr(sums, -after).statistic)


def test_a_components_parameters_give_way_to_keys_that_are_set() -> None:
    plain = dataflex.load_config()
    assert with_component(plain, "less-contrast").contrast == "pool"
    packaged = dataflex.load_config(options={"component_name": "less-contrast"})
    assert with_component(packaged, "less").contrast == 0 and not with_component(packaged, "less").marginal
    chosen = dataflex.load_config(options={"component_name": "less-contrast", "contrast": 4})
    assert with_component(chosen, "less-contrast-rds").contrast == 4
    assert with_component(chosen, "less-contrast-rds").selector == "less+rds"


def test_the_written_config_is_the_same_comparison(config: RunConfig, tmp_path: Path) -> None:
    """config.yaml leaves to each component what nobody set; a default written out would win over its parameters."""
    parts = tmp_path / "parts.yaml"
    parts.write_text("mine: {name: less, params: {contrast: 4, proj_dim: null}}\nless: {name: less}\n")
    chosen = config.changed(marginal=True, components_cfg_file=str(parts), selectors=["mine", "less-contrast"])
    save_config(chosen, tmp_path / "config.yaml", resolved=False)
    again = dataflex.load_config(tmp_path / "config.yaml")
    for name in ("mine", "less-contrast", "length"):
        assert with_component(again, name).model_dump() == with_component(chosen, name).model_dump()
    assert with_component(again, "mine").contrast == 4 and with_component(again, "less-contrast").contrast == "pool"


def test_what_fails_while_scoring_is_found_before_anything_is_trained(config: RunConfig, tmp_path: Path) -> None:
    new = config.changed(output=str(tmp_path / "out"))
    for changes, said in (
        ({"fp16": True}, "underflow"),
        ({"selectors": ["rds", "embed"]}, "needs embed_model"),
        ({"grad_layers": "7"}, "grad_layers 7"),
        ({"warmup_step": 0}, "warmup_step is 0"),
    ):
        with pytest.raises(UsageError, match=said):
            dataflex.compare(new.changed(**changes))
    assert not (tmp_path / "out").exists()


def test_orders_leave_out_rows_without_a_score(made: Path) -> None:
    scores = read_scores(made / "scores" / "rds.jsonl")
    assert len(ranking(scores.row, scores.score)) == 48
