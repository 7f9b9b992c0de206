"""`dynamic`: train on random rows, then select, train on the selection, select again.

The selection is the same code as `grads` and `score`, on the live model and its live optimizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataflex import processes
from dataflex.config import RunConfig, require
from dataflex.data.examples import Split, load_split
from dataflex.errors import UsageError
from dataflex.files import read_jsonl, write_jsonl
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.passes import mean_loss
from dataflex.influence.scores import best_rows, score_records
from dataflex.model import check_vocabulary, compute_dtype, device, load_tokenizer
from dataflex.progress import SILENT, Progress
from dataflex.projection.table import check_projector
from dataflex.provenance import RunRecord, Stopwatch
from dataflex.selectors.protocol import Selector, Situation
from dataflex.selectors.scoring import score_rows
from dataflex.selectors.table import make_selector
from dataflex.training.arguments import training_arguments
from dataflex.training.plots import plot_loss
from dataflex.training.resume import last_checkpoint, step_of
from dataflex.training.runs import already_finished, begin, check_run_folder, dated_run, origin_of, trainable_model
from dataflex.training.schedule import Schedule, dynamic_schedule, scheduled_rows
from dataflex.training.trainer import RowTrainer, fit


def dynamic(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Run the whole schedule and return `output_dir`: an adapter, its checkpoints and every selection made.

    Started again after it was stopped, it goes on from its last checkpoint and ends the same.
    """
    require(config, "dynamic")
    check_run_folder(config)
    selector = make_selector(config.selector)
    if not config.is_exact:
        check_projector(config.projector, config.proj_dim, device())
    schedule = dynamic_schedule(config)
    processes.join(config.ddp_timeout, config.deepspeed is not None)
    config = dated_run(config)
    watch = Stopwatch()
    with watch.phase("data"):
        tokenizer = load_tokenizer(config)
        train = load_split(config, tokenizer, "train", progress)
        validation = load_split(config, tokenizer, "eval", progress)
        check_selection_size(schedule, train)
    output_dir = Path(config.output_dir)
    came_from = origin_of(config, "dynamic", train, validation, progress)
    if already_finished(config, came_from, progress):
        return output_dir
    args = training_arguments(config, schedule.total_steps)
    with watch.phase("model"):
        model = trainable_model(config, train)
        check_vocabulary(model, validation.examples, config.template)
        capture = make_capture(model, compute_dtype(config), tokenizer.pad_token_id, config.token_budget)
    record = begin(config, came_from, progress)
    if config.token_budget is None:  # a run taken up again cuts the batches it began with, whatever is free now
        capture = replace(capture, token_budget=record.facts.get("token_budget", capture.token_budget))
        record.note(token_budget=capture.token_budget)
    rounds = _Rounds(config, selector, schedule, capture, train, validation, record, progress, watch)
    rounds.recall(step_of(last_checkpoint(output_dir)))
    with watch.phase("training"):
        history = fit(
            config,
            args,
            model,
            tokenizer,
            train.examples,
            steps_per_epoch=schedule.round_steps,
            rows_for_step=rounds.rows,
            progress=progress,
            eval_examples=validation.examples,
            save_at=schedule.selection_steps,
        )
    with watch.phase("evaluation"):
        loss_after = mean_loss(capture, validation.examples, progress, "eval loss after")
    watch.seconds["training"] -= watch.seconds.get("selection", 0.0) + rounds.loss_seconds
    if config.plot_loss and processes.rank() == 0:
        plot_loss(history, list(rounds.selections), output_dir / "training_loss.png")
    record.note(
        finished=True,
        seconds=watch.seconds,
        steps=schedule.total_steps,
        rows_per_step=schedule.rows_per_step,
        rows=len(train.examples),
        pool=count_by_dataset(train, range(len(train.examples))),
        selections=[
            {"step": step, "rows": len(chosen), "picked": count_by_dataset(train, chosen)}
            for step, chosen in rounds.selections.items()
        ],
        eval_rows=len(validation.examples),
        eval_loss={**record.facts["eval_loss"], "after": loss_after},
    )
    processes.barrier()
    return output_dir


def check_selection_size(schedule: Schedule, train: Split) -> None:
    """Raise a UsageError where a selection would need more rows than there are."""
    needed, there = schedule.rows_per_selection, len(train.examples)
    if schedule.selection_steps and needed > there:
        raise UsageError(
            f"each selection takes {needed} rows ({schedule.rows_per_step} a step × "
            f"update_step {schedule.update_step}), but the dataset has {there}; "
            "lower update_step or the batch size, or name more data"
        )


def count_by_dataset(split: Split, indices: Iterable[int]) -> dict[str, int]:
    """How many of `indices` come from each dataset, in the order the datasets were named."""
    counts = {example.dataset: 0 for example in split.examples}
    for index in indices:
        counts[split.examples[index].dataset] += 1
    return counts


@dataclass
class _Rounds:
    """Makes the selections as the training reaches them, and says which rows each step takes."""

    config: RunConfig
    selector: Selector
    schedule: Schedule
    capture: Capture
    train: Split
    validation: Split
    record: RunRecord
    progress: Progress
    watch: Stopwatch
    selections: dict[int, list[int]] = field(default_factory=dict)
    loss_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output_dir)

    def recall(self, resumed_at: int) -> None:
        """Read the selections that a run taken up after `resumed_at` steps has made already."""
        places = {example.row: index for index, example in enumerate(self.train.examples)}
        for step in self.schedule.selection_steps:
            path = self.folder / "selections" / f"step-{step}.jsonl"
            if step <= resumed_at and path.is_file():
                self.selections[step] = [places[line["row"]] for line in read_jsonl(path, "selection")]

    def rows(self, step: int, trainer: RowTrainer) -> list[int]:
        """Indices of the rows that `step` trains on."""
        if "eval_loss" not in self.record.facts:
            # only now, inside the training: under ZeRO-3 the model cannot run before
            with self.watch.phase("evaluation"):
                before = mean_loss(self.capture, self.validation.examples, self.progress, "eval loss before")
            self.loss_seconds = self.watch.seconds["evaluation"]
            self.record.note(eval_loss={"before": before})
        selected_at = self.schedule.selection_of(step)
        if selected_at is not None and selected_at not in self.selections:
            with self.watch.phase("selection"):
                self.selections[selected_at] = self._select(selected_at, trainer)
        return scheduled_rows(self.schedule, step, len(self.train.examples), self.config.seed, self.selections)

    def _select(self, step: int, trainer: RowTrainer) -> list[int]:
        cache = Path(self.config.cache_dir or self.folder / "gradients") / f"step-{step}"
        situation = Situation(
            config=self.config,
            capture=self.capture,
            train=self.train,
            validation=self.validation,
            moments=trainer.moments(),
            cache=cache,
            memory=self.folder / "selections",
            past_steps=[past for past in self.selections if past < step],
            progress=self.progress,
        )
        scores = score_rows(self.selector, situation)
        best = best_rows(scores, self.schedule.rows_per_selection)
        if processes.rank() == 0:
            write_jsonl(self.folder / "selections" / f"step-{step}.jsonl", score_records(scores, best))
            if self.config.cache_dir is None:
                shutil.rmtree(self.folder / "gradients", ignore_errors=True)
        picked = count_by_dataset(self.train, best)
        shares = ", ".join(f"{count} {name}" for name, count in picked.items())
        self.progress.say(f"step {step}: selected {len(best)} rows: {shares}")
        return best
