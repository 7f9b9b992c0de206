"""The `compare` command: does a selection train better than random rows?

Every arm trains from the same start on rows that its selector ranks first, and is measured on held-out rows. What an
arm needs is made by the library's own `warmup`, `score`, `train` and `evaluate`, in files that a later call reuses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.comparison.arms import (
    ALL,
    CONTROLS,
    RANDOM,
    UNTOUCHED,
    Training,
    all_is_affordable,
    file_name,
    random_halves,
    rows_of_budget,
    tenths,
)
from dataflex.comparison.figures import agreement, datamodeling_score, decile_test, paired_difference
from dataflex.config import RunConfig, needed
from dataflex.config_file import with_component
from dataflex.data.catalog import find_sources
from dataflex.data.examples import Split
from dataflex.data.rows import dataset_columns, row_numbers, supervised_tokens
from dataflex.data.subset import subset_records, take_records
from dataflex.evaluation.overlap import refuse_overlaps
from dataflex.evaluation.run import evaluate
from dataflex.files import json_lines, read_jsonl, write_json, write_text
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.influence.scores import ranking, read_scores
from dataflex.influence.scoring import score
from dataflex.needs import as_run, check_needs, on_held_out
from dataflex.origin import Origin, origin
from dataflex.outline import outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Progress
from dataflex.provenance import RunRecord, Stopwatch, open_record, read_record
from dataflex.reporting.run import report
from dataflex.selectors.table import make_selector, reads_of
from dataflex.training.runs import dated_run, train, warmup
from dataflex.training.schedule import training_steps, warmup_steps

REPORT = "report.json"
REMAINS = ("run.json", "seed-*", "scores", f"{UNTOUCHED}.*", "report.*")
"""What a comparison that starts afresh must not find."""


@dataclass(frozen=True)
class Comparison:
    """A comparison that is ready to begin."""

    config: RunConfig
    came_from: Origin | None
    """None in a dry run."""
    pool: Split
    selectors: dict[str, RunConfig]
    """By name, in order, the configuration with the selector and the parameters of that component."""
    with_all: bool
    """Whether an arm trains on every row."""
    progress: Progress

    @property
    def folder(self) -> Path:
        return Path(needed(self.config.output_dir))

    @property
    def seeds(self) -> list[int]:
        return [self.config.seed + number for number in range(self.config.seeds)]


def compare(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train each of `selectors`, and the controls, on the rows it ranks first, and measure them on `held_out`.

    Returns the folder `output`, with report.json and everything it was made from. Started again after it was stopped,
    or with further selectors, budgets or seeds, it makes only what is not there yet.
    """
    ready = prepare_compare(config, Plan("compare"), progress)
    with open_record(ready.config, needed(ready.came_from), REMAINS) as record:
        found = _Trainings(ready, record).report()
        if processes.rank() == 0:
            write_json(ready.folder / REPORT, found)
        record.note(finished=True)
        if ready.config.report and processes.rank() == 0:
            report(ready.config, ready.folder, progress=progress)
        processes.barrier()
    return ready.folder


def prepare_compare(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Comparison:
    """Find out and check everything that `compare` needs; nothing is written."""
    check_needs(config, "compare")
    config = as_run(config)
    if not plan.dry_run:
        processes.join(config.ddp_timeout, config.deepspeed is not None)
    config = dated_run(config)
    names = list(dict.fromkeys([*CONTROLS, *config.selectors]))
    selectors = {name: with_component(config, name) for name in names}
    for own in selectors.values():
        make_selector(own.selector)
    _, held = read_rows(on_held_out(config), ["eval"], plan, progress)
    if plan.dry_run:
        plan.data["held-out"] = plan.data.pop("eval")
    _, splits = read_rows(config, ["train", "eval"], plan, progress)
    pool = splits["train"]
    if not config.allow_overlap:
        for what, split in (("the training data", pool), ("the validation data", splits["eval"])):
            refuse_overlaps(held["eval"].examples, split.examples, what, progress)
    with_all = all_is_affordable(config.budget, len(names))
    plan.schedule = schedule_of(config, selectors, with_all, len(pool.examples))
    sizes = outline(config, plan, [*splits.values(), *held.values()], config.resumed_adapter)
    plan.needs_weights(config, sizes.base)
    came_from = None
    if not plan.dry_run:
        base_model, base_facts = base_model_fingerprint(config, progress)
        content = {
            "dataset": pool.fingerprint,
            "eval_dataset": splits["eval"].fingerprint,
            "held_out": held["eval"].fingerprint,
            "base_model": base_model,
            "adapter": adapter_fingerprint(config.resumed_adapter) if config.resumed_adapter else None,
        }
        facts = {
            "dataset": pool.facts,
            "eval_dataset": splits["eval"].facts,
            "held_out": held["eval"].facts,
            "base_model": base_facts,
        }
        came_from = origin(config, "compare", content, facts)
    return Comparison(config, came_from, pool, selectors, with_all, progress)


def schedule_of(config: RunConfig, selectors: dict[str, RunConfig], with_all: bool, rows: int) -> dict[str, Any]:
    """How many trainings a comparison takes, and their optimizer steps, about."""
    sizes = [max(1, round(share * rows)) for share in config.budget] * len(selectors) + [rows] * with_all
    sizes += [rows // 10] * 10 * (len(selectors) - 1) * config.deciles + [rows // 2] * (config.lds or 0)
    steps = sum(training_steps(config, size) for size in sizes)
    warmups = any(_needs_warmup(own) for own in selectors.values())
    return {
        "arms": [UNTOUCHED, *selectors, *([ALL] if with_all else [])],
        "budgets": config.budget,
        "by": config.by,
        "seeds": config.seeds,
        "trainings": len(sizes) * config.seeds,
        "steps": config.seeds * (steps + (warmup_steps(config) if warmups else 0)),
        "rows_per_step": config.rows_per_step,
    }


def _needs_warmup(config: RunConfig) -> bool:
    """Whether the selector looks at an adapter that has to be trained first."""
    return "adapter" in reads_of(config.selector) and not config.checkpoint


def _is_the_same_for_all_seeds(config: RunConfig) -> bool:
    return "adapter" not in reads_of(config.selector) and RANDOM not in config.selector.split("+")


@dataclass
class _Trainings:
    """What a comparison makes, piece by piece."""

    ready: Comparison
    record: RunRecord

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.record.facts.get("seconds", {}))
        self.config, self.folder, self.progress = self.ready.config, self.ready.folder, self.ready.progress
        self.tokens = supervised_tokens(self.ready.pool.examples)
        self.rows = row_numbers(self.ready.pool.examples)
        self.datasets, self.source = dataset_columns(self.ready.pool.examples)

    def report(self) -> dict[str, Any]:
        """Make what is not there yet, and put all figures together."""
        scores = {name: [self._scores(name, seed) for seed in self.ready.seeds] for name in self.ready.selectors}
        trainings = self._main_trainings(scores)
        further = self._tenths(scores) if self.config.deciles else []
        halves = self._halves() if self.config.lds else []
        made: dict[tuple[str, int, str], tuple[Training, np.ndarray]] = {}
        everything = [*trainings, *further, *halves]
        untouched = self._untouched()
        with self.progress.task("trainings", len(everything), "trainings") as task:
            for training in everything:
                loss = self._loss_after(training)
                made[training.arm, training.seed, training.part] = training, loss
                self.record.note(seconds=self.watch.seconds)
                processes.advance(task)
        return self._figures(untouched, made, scores)

    # --- what is made ------------------------------------------------------------------------

    def _scores(self, name: str, seed: int) -> np.ndarray:
        """[N] the scores of the pool's rows; NaN where a row has none."""
        own = self.ready.selectors[name].changed(seed=seed)
        place = self.folder if _is_the_same_for_all_seeds(own) else self.folder / f"seed-{seed}"
        path = place / "scores" / f"{file_name(name)}.jsonl"
        changes: dict[str, Any] = {"output": str(path), "overwrite": True, "component_name": own.selector}
        if _needs_warmup(own):
            changes["checkpoint"] = [str(self._warmup(seed))]
        own = own.changed(**changes)
        content = {key: value for key, value in needed(self.ready.came_from).content.items() if key != "held_out"}
        content["checkpoint"] = ", ".join(adapter_fingerprint(path) for path in own.checkpoint or []) or None
        with self.watch.phase("scores"):
            self._unless_made(path, origin(own, "score", content, {}), lambda: score(own, self.progress))
        found = read_scores(path)
        scores = np.full(len(self.rows), np.nan)
        scores[np.searchsorted(self.rows, found.row)] = found.score
        return scores

    def _unless_made(self, path: Path, came_from: Origin, make: Callable[[], Any]) -> None:
        """Make the file `path`, unless it is there and was made from the same."""
        beside = path.with_suffix(".origin.json")
        kept = None
        if processes.rank() == 0 and path.is_file() and beside.is_file():
            kept = next(read_jsonl(beside, "origin"), None)
        kept = processes.broadcast(kept)
        if kept is not None and not Origin.from_json(kept).differences(came_from):
            return
        if processes.rank() == 0:
            beside.unlink(missing_ok=True)
        make()
        if processes.rank() == 0:
            write_json(beside, came_from.as_json())

    def _warmup(self, seed: int) -> Path:
        """The checkpoint at which the selectors of this seed look."""
        folder = self.folder / f"seed-{seed}" / "warmup"
        with self.watch.phase("warm-up"):
            return warmup(self._as_training(seed, output_dir=str(folder), max_steps=-1), self.progress)

    def _as_training(self, seed: int, **changes: Any) -> RunConfig:
        plain = {"eval_strategy": "no", "report_to": "none", "plot_loss": False, "save_strategy": "no"}
        return self.config.changed(seed=seed, overwrite=False, overwrite_output_dir=False, **plain, **changes)

    def _loss_after(self, training: Training) -> np.ndarray:
        """[held-out rows] losses after a training."""
        place = self.folder / f"seed-{training.seed}"
        subset = place / "subsets" / f"{training.name}.jsonl"
        folder, result = place / "runs" / training.name, place / "evals" / f"{training.name}.json"
        if processes.rank() == 0 and not self._holds(subset, training):
            shutil.rmtree(folder, ignore_errors=True)  # the run of other rows
            result.unlink(missing_ok=True)
            self._write_subset(subset, training)
        processes.barrier()
        if processes.broadcast(result.is_file()):
            return self._losses(result)
        own = self._as_training(
            training.seed,
            output_dir=str(folder),
            dataset=[str(subset)],
            eval_dataset=None,
            max_samples=None,
        )
        with self.watch.phase("training"):
            train(own, self.progress)
        adapters = [*self.config.folded_adapters, str(folder)]
        loss = self._evaluate(result, adapter_name_or_path=adapters, create_new_adapter=False)
        if processes.rank() == 0:  # only a run that goes on needs them
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return loss

    def _holds(self, subset: Path, training: Training) -> bool:
        """Whether the file has the rows of `training`, in order."""
        if not subset.is_file():
            return False
        rows = [line["dataflex"]["row"] for line in read_jsonl(subset, "subset")]
        return rows == self.rows[training.indices].tolist()

    def _write_subset(self, path: Path, training: Training) -> None:
        rows = self.rows[training.indices].tolist()
        sources = find_sources(needed(self.config.dataset), self.config.dataset_dir)
        taken, _ = take_records(sources, rows, expected=int(self.rows[-1]) + 1, progress=self.progress)
        records = subset_records([taken[row] for row in rows], rows)
        lines = json_lines(
            path, ({**record, "dataflex": {"row": row}} for record, row in zip(records, rows, strict=True))
        )
        write_text(path, "".join(lines))

    def _untouched(self) -> np.ndarray:
        """[held-out rows] losses of the model as it is."""
        result = self.folder / f"{UNTOUCHED}.json"
        return self._losses(result) if processes.broadcast(result.is_file()) else self._evaluate(result)

    def _evaluate(self, result: Path, **changes: Any) -> np.ndarray:
        rows = result.with_suffix(".rows.jsonl")
        # that no held-out row was trained on has been looked at
        own = self.config.changed(output=str(result), rows=str(rows), overwrite=False, allow_overlap=True, **changes)
        if "max_new_tokens" not in own.model_fields_set:
            own = own.changed(max_new_tokens=0)
        if processes.rank() == 0:
            rows.unlink(missing_ok=True)  # of an evaluation that was killed while it wrote
        processes.barrier()
        with self.watch.phase("evaluation"):
            evaluate(own, self.progress)
        return self._losses(result)

    def _losses(self, result: Path) -> np.ndarray:
        return np.array([line["loss"] for line in read_jsonl(result.with_suffix(".rows.jsonl"), "held-out rows")])

    # --- what is trained -----------------------------------------------------------------------

    def _order(self, scores: np.ndarray) -> np.ndarray:
        """The indices of the rows that have a score, best first."""
        return ranking(self.rows, scores)[: int(np.isfinite(scores).sum())]

    def _main_trainings(self, scores: dict[str, list[np.ndarray]]) -> list[Training]:
        """The arms at each budget; all arms of a seed follow each other, so that a seed is whole early."""
        trainings = []
        for number, seed in enumerate(self.ready.seeds):
            for share in self.config.budget:
                for name, of_seeds in scores.items():
                    order = self._order(of_seeds[number])
                    taken = rows_of_budget(order, self.tokens, share, self.config.by)
                    trainings.append(Training(name, seed, _part(share, self.config.by), taken, share))
            if self.ready.with_all:
                trainings.append(Training(ALL, seed, _part(1.0, "rows"), np.arange(len(self.rows)), 1.0))
        return trainings

    def _tenths(self, scores: dict[str, list[np.ndarray]]) -> list[Training]:
        """Each tenth of each ranking but that by length."""
        return [
            Training(name, seed, f"tenth-{place}", part)
            for name, of_seeds in scores.items()
            if name != "length" or "length" in self.config.selectors
            for seed, of_seed in zip(self.ready.seeds, of_seeds, strict=True)
            for place, part in enumerate(tenths(self._order(of_seed)), start=1)
        ]

    def _halves(self) -> list[Training]:
        return [
            Training("half", seed, str(number), half)
            for seed in self.ready.seeds
            for number, half in enumerate(random_halves(len(self.rows), needed(self.config.lds), seed))
        ]

    # --- what is found -------------------------------------------------------------------------

    def _figures(
        self,
        untouched: np.ndarray,
        made: dict[tuple[str, int, str], tuple[Training, np.ndarray]],
        scores: dict[str, list[np.ndarray]],
    ) -> dict[str, Any]:
        seeds, config = self.ready.seeds, self.config
        main = [pair for pair in made.values() if pair[0].budget is not None]
        found: dict[str, Any] = {
            "command": "compare",
            "by": config.by,
            "budgets": config.budget,
            "seeds": seeds,
            "arms": [UNTOUCHED, *scores, *([ALL] if self.ready.with_all else [])],
            "held_out": {"datasets": config.held_out, "rows": len(untouched)},
            "pool": {"rows": len(self.rows), "tokens": int(self.tokens.sum()), "datasets": self._by_dataset(None)},
            "untouched": {"loss": float(untouched.mean())},
            "runs": [self._of_run(training, loss) for training, loss in main],
            "summary": [],
            "agreement": [],
            "seconds": dict(self.watch.seconds),
        }
        for share in config.budget:
            part = _part(share, config.by)
            losses = {name: np.stack([made[name, seed, part][1] for seed in seeds]) for name in scores}
            picks = {name: [made[name, seed, part][0].indices.tolist() for seed in seeds] for name in scores}
            losses[UNTOUCHED] = np.tile(untouched, (len(seeds), 1))
            if self.ready.with_all:
                losses[ALL] = np.stack([made[ALL, seed, _part(1.0, "rows")][1] for seed in seeds])
            for name in found["arms"]:
                against = {} if name == RANDOM else paired_difference(losses[name], losses[RANDOM])
                found["summary"].append({"arm": name, "budget": share, "loss": float(losses[name].mean()), **against})
            found["agreement"] += [
                {"a": one, "b": other, "budget": share, "share": agreement(picks[one], picks[other])}
                for place, one in enumerate(scores)
                for other in list(scores)[place + 1 :]
            ]
        if config.deciles:
            found["deciles"] = {
                name: decile_test(
                    np.array(
                        [[made[name, seed, f"tenth-{place}"][1].mean() for place in range(1, 11)] for seed in seeds]
                    )
                )
                for name in scores
                if (name, seeds[0], "tenth-1") in made
            }
        if config.lds:
            found["lds"] = {name: self._lds(of_seeds, made) for name, of_seeds in scores.items() if name != RANDOM}
        return found

    def _lds(
        self, scores: Sequence[np.ndarray], made: dict[tuple[str, int, str], tuple[Training, np.ndarray]]
    ) -> list[float | None]:
        """By seed."""
        found = []
        for seed, of_seed in zip(self.ready.seeds, scores, strict=True):
            halves = [made["half", seed, str(number)] for number in range(needed(self.config.lds))]
            loss = np.array([loss.mean() for _, loss in halves])
            found.append(datamodeling_score(of_seed, [training.indices for training, _ in halves], loss))
        return found

    def _of_run(self, training: Training, loss: np.ndarray) -> dict[str, Any]:
        folder = self.folder / f"seed-{training.seed}" / "runs" / training.name
        return {
            "arm": training.arm,
            "budget": training.budget,
            "seed": training.seed,
            "rows": len(training.indices),
            "tokens": int(self.tokens[training.indices].sum()),
            "picked": self._by_dataset(training.indices),
            "loss": float(loss.mean()),
            "seconds": needed(read_record(folder)).facts["seconds"]["training"],
            "folder": str(folder),
        }

    def _by_dataset(self, indices: np.ndarray | None) -> dict[str, int]:
        source = self.source if indices is None else self.source[indices]
        counts = np.bincount(source, minlength=len(self.datasets))
        return {name: int(count) for name, count in zip(self.datasets, counts, strict=True)}


def _part(share: float, by: str) -> str:
    return f"{share:g}" if by == "rows" else f"{share:g}-{by}"
