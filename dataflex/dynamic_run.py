"""`dynamic`: train on random rows, then select, train on the selection, select again.

The selection is the same code as `grads` and `score`, on the live model and its live optimizer.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig, require
from dataflex.data.examples import Split, load_split
from dataflex.errors import UsageError
from dataflex.files import check_output_dir, write_jsonl
from dataflex.gradients.passes import Pass, make_pass, mean_loss
from dataflex.influence.scores import ranking, score_records
from dataflex.model import check_vocabulary, compute_dtype, load_tokenizer
from dataflex.progress import SILENT, Progress
from dataflex.provenance import Stopwatch, write_run
from dataflex.selectors import Situation, make_selector
from dataflex.training.plots import plot_loss
from dataflex.training.runs import refuse_unsupported, trainable_model
from dataflex.training.schedule import Schedule, dynamic_schedule, scheduled_rows
from dataflex.training.trainer import RowTrainer, fit


def dynamic(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Run the whole schedule and return `output_dir`: an adapter, its checkpoints and every selection made."""
    require(config, "dynamic", "model_name_or_path", "dataset", "eval_dataset", "output_dir")
    refuse_unsupported(config)
    overwrite = config.overwrite or config.overwrite_output_dir
    output_dir = check_output_dir(config.output_dir, "output_dir", overwrite)
    schedule = dynamic_schedule(config)
    watch = Stopwatch()
    with watch.phase("data"):
        tokenizer = load_tokenizer(config)
        train = load_split(config, tokenizer, "train", progress)
        validation = load_split(config, tokenizer, "eval", progress)
        check_selection_size(schedule, train)
    with watch.phase("model"):
        model = trainable_model(config, train)
        check_vocabulary(model, validation.examples, config.template)
    run = make_pass(model, compute_dtype(config), tokenizer.pad_token_id, config.token_budget)
    with watch.phase("evaluation"):
        loss_before = mean_loss(run, validation.examples, progress, "eval loss before")

    rounds = _Rounds(config.changed(overwrite=overwrite), schedule, run, train, validation, progress, watch)
    with watch.phase("training"):
        history = fit(
            config,
            model,
            tokenizer,
            train.examples,
            total_steps=schedule.total_steps,
            steps_per_epoch=schedule.round_steps,
            rows_for_step=rounds.rows,
            progress=progress,
            eval_examples=validation.examples,
        )
    watch.seconds["training"] -= watch.seconds.get("selection", 0.0)
    with watch.phase("evaluation"):
        loss_after = mean_loss(run, validation.examples, progress, "eval loss after")
    if config.plot_loss:
        plot_loss(history, list(rounds.selections), output_dir / "training_loss.png")
    write_run(
        config,
        "dynamic",
        watch,
        steps=schedule.total_steps,
        rows_per_step=schedule.rows_per_step,
        rows=len(train.examples),
        pool=count_by_dataset(train, range(len(train.examples))),
        selections=[
            {"step": step, "rows": len(chosen), "picked": count_by_dataset(train, chosen)}
            for step, chosen in rounds.selections.items()
        ],
        eval_rows=len(validation.examples),
        eval_loss={"before": loss_before, "after": loss_after},
    )
    return output_dir


def check_selection_size(schedule: Schedule, train: Split) -> None:
    """Raise a UsageError where a selection would need more rows than there are."""
    needed, there = schedule.rows_per_selection, len(train.examples)
    if schedule.selection_steps and needed > there:
        raise UsageError(
            f"each selection takes {needed} rows ({schedule.rows_per_step} a step × update_step {schedule.update_step}), "
            f"but the dataset has {there}; lower update_step or the batch size, or name more data"
        )


def count_by_dataset(split: Split, indices: Any) -> dict[str, int]:
    """How many of `indices` come from each dataset, in the order the datasets were named."""
    counts = {example.dataset: 0 for example in split.examples}
    for index in indices:
        counts[split.examples[index].dataset] += 1
    return counts


@dataclass
class _Rounds:
    """Makes the selections as the training reaches them, and says which rows each step takes."""

    config: RunConfig
    schedule: Schedule
    run: Pass
    train: Split
    validation: Split
    progress: Progress
    watch: Stopwatch

    def __post_init__(self) -> None:
        self.selector = make_selector(self.config)
        self.selections: dict[int, list[int]] = {}

    def rows(self, step: int, trainer: RowTrainer) -> list[int]:
        """Indices of the rows that `step` trains on."""
        selected_at = self.schedule.selection_of(step)
        if selected_at is not None and selected_at not in self.selections:
            with self.watch.phase("selection"):
                self.selections[selected_at] = self._select(selected_at, trainer)
        return scheduled_rows(self.schedule, step, len(self.train.examples), self.config.seed, self.selections)

    def _select(self, step: int, trainer: RowTrainer) -> list[int]:
        output_dir = Path(self.config.output_dir)
        folder = Path(self.config.cache_dir or output_dir / "gradients") / f"step-{step}"
        situation = Situation(
            self.config, self.run, self.train, self.validation, trainer.moments(), folder, self.progress
        )
        scores = self.selector.score(situation)
        best = ranking(scores.row, scores.score)[: self.schedule.rows_per_selection].tolist()
        write_jsonl(output_dir / "selections" / f"step-{step}.jsonl", score_records(scores, best))
        if self.config.cache_dir is None:
            shutil.rmtree(output_dir / "gradients", ignore_errors=True)
        picked = count_by_dataset(self.train, best)
        self.progress.say(f"step {step}: selected {len(best)} rows, " + ", ".join(f"{n} {name}" for name, n in picked.items()))
        return best
