"""`dynamic`: train on random rows, then select, train on the selection, select again.

The selection is the same code as `grads` and `score`, on the live model and its live optimizer.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split
from dataflex.data.rows import count_by_dataset, row_numbers, supervised_tokens
from dataflex.errors import UsageError
from dataflex.files import check_room, read_jsonl, write_jsonl
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.passes import losses_of_rows, mean_loss
from dataflex.influence.score_file import score_records
from dataflex.influence.score_table import read_score_table, write_score_table
from dataflex.influence.scores import Scores, best_rows, length_correlation
from dataflex.model import compute_dtype, device
from dataflex.needs import check_needs
from dataflex.outline import Outline, note_gradient_pass, note_store
from dataflex.planning import Plan
from dataflex.progress import SILENT, Progress, Task
from dataflex.projection.table import check_projector
from dataflex.provenance import RunRecord
from dataflex.reporting.run import PAGE, report
from dataflex.selectors.protocol import Selector, Situation
from dataflex.selectors.scoring import score_rows
from dataflex.selectors.table import make_selector
from dataflex.training.checkpoints import step_of
from dataflex.training.moments import AdamMoments
from dataflex.training.resume import last_checkpoint
from dataflex.training.runs import Run, begin, finish, prepare_training, train_run
from dataflex.training.schedule import Schedule, dynamic_schedule, scheduled_rows

OTHER_ROWS = 32  # random rows of the pool whose loss tells what training on selected rows makes the model forget

QUANTILES = {"lowest": 0.0, "median": 0.5, "best_tenth": 0.9, "best": 1.0}
"""The quantiles of the scores that trackers are shown."""


def dynamic(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Run the whole schedule and return `output_dir`: an adapter, its checkpoints and every selection made.

    Started again after it was stopped, it goes on from its last checkpoint and ends the same.
    """
    ready = prepare_dynamic(config, Plan("dynamic"), progress)
    output_dir = Path(needed(config.output_dir))
    if ready is None:
        if config.report and processes.rank() == 0 and not (output_dir / PAGE).is_file():
            report(config, output_dir, progress=progress)  # a run that was killed after its last step
        return output_dir
    run, schedule, capture = ready.run, ready.schedule, ready.capture
    with begin(run) as record:
        if config.token_budget is None:  # a run taken up again cuts the batches it began with, whatever is free now
            capture = replace(capture, token_budget=record.facts.get("token_budget", capture.token_budget))
            record.note(token_budget=capture.token_budget)
        selections = _Selections(run, ready.selector, schedule, capture, record)
        selections.recall(step_of(last_checkpoint(output_dir)))
        history = train_run(
            run,
            steps_per_epoch=schedule.round_steps,
            rows_of=selections.rows_of,
            before_step=selections.prepare,
            save_at=schedule.selection_steps,
            pauses={"selection": len(set(schedule.selection_steps) - selections.made.keys())},
        )
        with run.watch.phase("evaluation"):
            loss_after = mean_loss(capture, needed(run.validation).examples, progress, "eval loss after")
            others = selections.others_after()
        finish(
            run,
            record,
            history,
            list(selections.made),
            rows_per_step=schedule.rows_per_step,
            rows=len(run.train.examples),
            pool=count_by_dataset(run.train.examples, range(len(run.train.examples))),
            selections=selections.facts(),
            eval_rows=len(needed(run.validation).examples),
            eval_loss={**record.facts["eval_loss"], "after": loss_after},
            others=others,
        )
        if config.report and processes.rank() == 0:
            report(config, output_dir, progress=progress)
        processes.barrier()
    return output_dir


@dataclass(frozen=True)
class Ready:
    """A run that is ready to begin."""

    run: Run
    selector: Selector
    schedule: Schedule
    capture: Capture


def prepare_dynamic(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Ready | None:
    """Find out and check everything that `dynamic` needs; nothing is written. None, and said, where it is finished."""
    check_needs(config, "dynamic")
    selector = make_selector(config.selector)
    if not config.is_exact:
        check_projector(config.projector, needed(config.proj_dim), device())
    schedule = dynamic_schedule(config)
    plan.schedule = {
        "steps": schedule.total_steps,
        "rounds": config.num_train_epochs,
        "steps_per_round": schedule.round_steps,
        "rows_per_step": schedule.rows_per_step,
        "warmup_steps": min(schedule.warmup_step, schedule.total_steps),
        "selections": schedule.selection_steps,
        "rows_per_selection": schedule.rows_per_selection,
    }

    def steps_over(train: Split) -> int:
        check_selection_size(schedule, train, config.candidates if config.prefilter else None)
        return schedule.total_steps

    def note(sizes: Outline, splits: Sequence[Split]) -> list[int]:
        if not config.is_exact:
            folder = Path(config.cache_dir or needed(config.output_dir))
            wanted = note_store(config, plan, sizes, splits)
            check_room(folder / "stores", f"gradient stores in {folder}", wanted, "lower proj_dim, or name a cache_dir")
        return note_gradient_pass(config, plan, sizes, splits, len(schedule.selection_steps))

    run = prepare_training(config, plan, progress, steps_over, note)
    if run is None:
        return None
    capture = make_capture(
        run.model, compute_dtype(config), run.tokenizer.pad_token_id, config.token_budget, config.grad_layers
    )
    return Ready(run, selector, schedule, capture)


def check_selection_size(schedule: Schedule, train: Split, prefiltered: float | None = None) -> None:
    """Raise a UsageError where a selection would need more rows than there are, or than the `prefiltered` share."""
    needed, there = schedule.rows_per_selection, len(train.examples)
    scored = there if prefiltered is None else round(prefiltered * there)
    if schedule.selection_steps and scored < needed <= there:
        raise UsageError(
            f"each selection takes {needed} rows, and of {there} rows the prefilter leaves {scored} to score; raise "
            f"candidates to {needed / there:.2g} at least, or leave prefilter out"
        )
    if schedule.selection_steps and needed > there:
        raise UsageError(
            f"each selection takes {needed} rows ({schedule.rows_per_step} a step × "
            f"update_step {schedule.update_step}), but the dataset has {there}; "
            "lower update_step or the batch size, or name more data"
        )


@dataclass
class _Selections:
    """The selections of a run: `prepare` makes those that are due, `rows_of` reads them."""

    run: Run
    selector: Selector
    schedule: Schedule
    capture: Capture
    record: RunRecord
    made: dict[int, list[int]] = field(default_factory=dict)
    """Step → indices of the rows selected before it, best first."""

    def __post_init__(self) -> None:
        self.folder = Path(needed(self.run.config.output_dir))

    def recall(self, resumed_at: int) -> None:
        """Read the selections that a run taken up after `resumed_at` steps has made already."""
        rows = row_numbers(self.run.train.examples)
        for step in self.schedule.selection_steps:
            path = self.folder / "selections" / f"step-{step}.jsonl"
            if step <= resumed_at and path.is_file():
                chosen = [line["row"] for line in read_jsonl(path, "selection")]
                self.made[step] = np.searchsorted(rows, chosen).tolist()

    def facts(self) -> list[dict[str, Any]]:
        """What run.json says of each selection. `length_correlation` is Spearman's, of all scores with supervised
        tokens."""
        return [
            {
                "step": step,
                "rows": len(chosen),
                "picked": count_by_dataset(self.run.train.examples, chosen),
                "length_correlation": self._length_correlation(step),
            }
            for step, chosen in self.made.items()
        ]

    def _length_correlation(self, step: int) -> float | None:
        scores, tokens = read_score_table(self._table(step))
        return length_correlation(scores.score, tokens)

    def _table(self, step: int) -> Path:
        return self.folder / "selections" / f"step-{step}.parquet"

    def rows_of(self, step: int) -> list[int]:
        """Indices of the rows that `step` trains on."""
        return scheduled_rows(self.schedule, step, len(self.run.train.examples), self.run.config.seed, self.made)

    def prepare(self, step: int, moments: Callable[[], AdamMoments], task: Task) -> dict[str, float]:
        """Evaluate before the first step, and select where `step` begins a selection's rows; return what trackers are
        shown of the selection."""
        run = self.run
        if "eval_loss" not in self.record.facts:
            # only now, inside the training: under ZeRO-3 the model cannot run before
            with task.pause("first evaluation"), run.watch.phase("evaluation"):
                before = mean_loss(self.capture, needed(run.validation).examples, run.progress, "eval loss before")
                others = self._losses_of_others("other rows before") if run.config.report else []
            self.record.note(eval_loss={"before": before}, losses_of_others=others)
        selected_at = self.schedule.selection_of(step)
        if selected_at is None or selected_at in self.made:
            return {}
        started = time.monotonic()
        with task.pause("selection"), run.watch.phase("selection"):
            scores, chosen = self._select(selected_at, moments())
        last = self.made[max(self.made)] if self.made else None
        self.made[selected_at] = chosen
        return {"selection/seconds": time.monotonic() - started, **self._figures(scores, chosen, last)}

    def _figures(self, scores: Scores, chosen: list[int], last: list[int] | None) -> dict[str, float]:
        """What trackers are shown of a selection: quantiles of all scores, the share of the rows that the `last`
        selection had as well, Spearman's correlation of scores with supervised tokens, and shares by dataset."""
        examples = self.run.train.examples
        quantiles = np.nanquantile(scores.score, list(QUANTILES.values())).tolist()
        figures = {f"selection/score_{name}": value for name, value in zip(QUANTILES, quantiles, strict=True)}
        if last is not None:
            figures["selection/overlap"] = len(set(chosen) & set(last)) / len(chosen)
        correlation = length_correlation(scores.score, supervised_tokens(examples))
        if correlation is not None:
            figures["selection/length_correlation"] = correlation
        picked = count_by_dataset(examples, chosen)
        return {**figures, **{f"selection/share/{name}": count / len(chosen) for name, count in picked.items()}}

    def _others(self) -> list[int]:
        """Indices of some random rows of the pool, whose loss is taken before and after training."""
        count = len(self.run.train.examples)
        drawn = np.random.default_rng((self.run.config.seed, 4)).permutation(count)[:OTHER_ROWS]
        return sorted(drawn.tolist())

    def _losses_of_others(self, description: str) -> list[float]:
        examples = [self.run.train.examples[index] for index in self._others()]
        return losses_of_rows(self.capture, examples, self.run.progress, description).tolist()

    def others_after(self) -> dict[str, float] | None:
        """The mean loss, before and after training, of those of some random rows that no step trained on; None where
        none is left or no report is wanted."""
        if not self.run.config.report:
            return None
        trained = {index for step in range(self.schedule.total_steps) for index in self.rows_of(step)}
        untrained = np.array([index not in trained for index in self._others()])
        before = np.array(self.record.facts.get("losses_of_others", []))
        if not untrained.any() or len(before) != len(untrained):
            return None
        after = np.array(self._losses_of_others("other rows after"))
        return {
            "rows": int(untrained.sum()),
            "before": float(before[untrained].mean()),
            "after": float(after[untrained].mean()),
        }

    def _select(self, step: int, moments: AdamMoments) -> tuple[Scores, list[int]]:
        """The scores of all rows, and the indices of the best, best first."""
        run, config = self.run, self.run.config
        cache = Path(config.cache_dir or self.folder / "gradients") / f"step-{step}"
        situation = Situation(
            config=config,
            tokenizer=run.tokenizer,
            train=run.train,
            compared_with=run.validation,
            open_capture=lambda: self.capture,
            moments=moments,
            step=step,
            cache=cache,
            memory=self.folder / "selections",
            past_steps=[past for past in self.made if past < step],
            progress=run.progress,
        )
        scores = score_rows(self.selector, situation)
        best = best_rows(scores, self.schedule.rows_per_selection)
        if processes.rank() == 0:
            write_score_table(self._table(step), scores, supervised_tokens(run.train.examples))
            write_jsonl(self.folder / "selections" / f"step-{step}.jsonl", score_records(scores, best))
            if config.cache_dir is None:
                shutil.rmtree(self.folder / "gradients", ignore_errors=True)
        picked = count_by_dataset(run.train.examples, best)
        shares = ", ".join(f"{count} {name}" for name, count in picked.items())
        correlation = length_correlation(scores.score, supervised_tokens(run.train.examples))
        likes = "" if correlation is None else f"; correlation of score and length {correlation:+.2f}"
        run.progress.say(f"step {step}: selected {len(best)} rows: {shares}{likes}")
        return scores, best
