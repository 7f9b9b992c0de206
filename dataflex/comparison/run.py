"""The `compare` command: does a selection train better than random rows?

Every arm trains from the same start on rows that its selector ranks first, and is measured on held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.comparison.arms import (
    CONTROLS,
    UNTOUCHED,
    Training,
    all_is_affordable,
    arms_at_budgets,
    halves_of_pool,
    tenths_of_rankings,
)
from dataflex.comparison.findings import findings
from dataflex.comparison.pieces import Pieces, needs_warmup
from dataflex.comparison.ready import Comparison, arms_of
from dataflex.config import RunConfig, needed
from dataflex.config_file import with_component
from dataflex.evaluation.overlap import refuse_overlaps
from dataflex.files import write_json
from dataflex.fingerprints import adapter_fingerprint, base_model_fingerprint
from dataflex.influence.scores import ranking
from dataflex.needs import as_run, check_needs, on_held_out
from dataflex.origin import origin
from dataflex.outline import outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Once, Progress
from dataflex.provenance import RunRecord, Stopwatch, open_record, read_record
from dataflex.reporting.facts import NUMBERS
from dataflex.reporting.run import report
from dataflex.reporting.verdicts import verdict_of_comparison
from dataflex.selectors.table import make_selector
from dataflex.training.runs import dated_run
from dataflex.training.schedule import training_steps, warmup_steps

REMAINS = ("run.json", "seed-*", "scores", f"{UNTOUCHED}.*", "report.*")
"""What a comparison that starts afresh must not find."""


def compare(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Train each of `selectors`, and the controls, on the rows it ranks first, and measure them on `held_out`.

    Returns the folder `output`, with report.json and everything it was made from. Started again after it was stopped,
    or with further selectors, budgets or seeds, it makes only what is not there yet.
    """
    progress = Once(progress)
    ready = prepare_compare(config, Plan("compare"), progress)
    with open_record(ready.config, needed(ready.came_from), REMAINS) as record:
        found = _make(ready, record)
        if processes.rank() == 0:
            write_json(ready.folder / NUMBERS, found)
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
    selectors = {name: with_component(config, name) for name in dict.fromkeys([*CONTROLS, *config.selectors])}
    for own in selectors.values():
        make_selector(own.selector)
    _, held = read_rows(on_held_out(config), ["eval"], plan, progress)
    if plan.dry_run:
        plan.data["held-out"] = plan.data.pop("eval")
    _, splits = read_rows(config, ["train", "eval"], plan, progress)
    pool, validation, held_out = splits["train"], splits["eval"], held["eval"]
    if not config.allow_overlap:
        for what, split in (("the training data", pool), ("the validation data", validation)):
            refuse_overlaps(held_out.examples, split.examples, what, progress)
    with_all = all_is_affordable(config.budget, len(selectors))
    plan.schedule = _schedule(config, selectors, with_all, len(pool.examples))
    for layers in dict.fromkeys(own.grad_layers for own in selectors.values()):
        sizes = outline(config, plan, [pool, validation, held_out], config.resumed_adapter, layers)
    plan.needs_weights(config, sizes.base)
    came_from = None
    if not plan.dry_run:
        splits_by_name = {"dataset": pool, "eval_dataset": validation, "held_out": held_out}
        base_model, base_facts = base_model_fingerprint(config, progress)
        content = {name: split.fingerprint for name, split in splits_by_name.items()}
        adapter = adapter_fingerprint(config.resumed_adapter) if config.resumed_adapter else None
        facts = {name: split.facts for name, split in splits_by_name.items()}
        came_from = origin(
            config,
            "compare",
            {**content, "base_model": base_model, "adapter": adapter},
            {**facts, "base_model": base_facts},
        )
    return Comparison(config, came_from, pool, selectors, with_all, progress)


def _schedule(config: RunConfig, selectors: Mapping[str, RunConfig], with_all: bool, rows: int) -> dict[str, Any]:
    """How many trainings a comparison takes, and their optimizer steps, about."""
    sizes = [max(1, round(share * rows)) for share in config.budget] * len(selectors) + [rows] * with_all
    if config.deciles:
        sizes += [rows // 10] * 10 * len(_ranked(config, selectors))
    sizes += [rows // 2] * (config.lds or 0)
    steps = sum(training_steps(config, size) for size in sizes)
    warmups = any(needs_warmup(own) for own in selectors.values())
    return {
        "arms": arms_of(selectors, with_all),
        "budgets": config.budget,
        "by": config.by,
        "seeds": config.seeds,
        "trainings": len(sizes) * config.seeds,
        "steps": config.seeds * (steps + (warmup_steps(config) if warmups else 0)),
        "rows_per_step": config.rows_per_step,
    }


def _ranked(config: RunConfig, selectors: Mapping[str, Any]) -> list[str]:
    """The selectors whose rankings are cut into tenths: all but the control by length, unless it is asked for."""
    return [name for name in selectors if name != "length" or name in config.selectors]


def _make(ready: Comparison, record: RunRecord) -> dict[str, Any]:
    """Make what is not there yet, and put all figures together."""
    config, watch = ready.config, Stopwatch(record.facts.get("seconds", {}))
    pieces = Pieces(ready, watch)
    scores = {name: [pieces.scores(name, seed) for seed in ready.seeds] for name in ready.selectors}
    orders = {name: [_order(ready, of_seed) for of_seed in of_seeds] for name, of_seeds in scores.items()}
    trainings = arms_at_budgets(orders, ready.tokens, ready.seeds, config.budget, config.by, ready.with_all)
    further: list[Training] = []
    if config.deciles:
        further += tenths_of_rankings({name: orders[name] for name in _ranked(config, orders)}, ready.seeds)
    if config.lds:
        further += halves_of_pool(len(ready.rows), ready.seeds, config.lds)
    untouched = pieces.untouched()
    made: dict[tuple[str, int, str], tuple[Training, np.ndarray]] = {}
    wanted = {training.key: training for training in [*trainings, *further]}
    there = {key for key, training in wanted.items() if pieces.is_made(training)}
    with ready.progress.task("trainings", len(wanted), "trainings", len(there)) as task:
        for key, training in wanted.items():
            made[key] = training, pieces.loss_after(training)
            record.note(seconds=watch.seconds)
            if key not in there:
                processes.advance(task)
    found = findings(ready, untouched, made, scores)
    found["runs"] = [
        _told(ready, training, made[training.key][1], pieces.run_folder(training)) for training in trainings
    ]
    return {**found, "seconds": dict(watch.seconds), "verdict": verdict_of_comparison(found)}


def _order(ready: Comparison, scores: np.ndarray) -> np.ndarray:
    """The indices of the rows that have a score, best first."""
    return ranking(ready.rows, scores)[: int(np.isfinite(scores).sum())]


def _told(ready: Comparison, training: Training, loss: np.ndarray, folder: Path) -> dict[str, Any]:
    """What report.json says of a run."""
    return {
        "arm": training.arm,
        "budget": training.budget,
        "seed": training.seed,
        "rows": len(training.indices),
        "tokens": int(ready.tokens[training.indices].sum()),
        "picked": ready.by_dataset(training.indices),
        "loss": float(loss.mean()),
        "seconds": needed(read_record(folder)).facts["seconds"]["training"],
        "folder": str(folder),
    }
