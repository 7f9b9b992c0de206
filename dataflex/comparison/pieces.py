"""What a comparison is made of, piece by piece, in files that a later call reuses: warm-ups, scores, trainings, losses.

Each piece is made by the library's own command. Scores are made anew where they come from something else; a training
and its evaluation where its rows are others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.comparison.arms import RANDOM, UNTOUCHED, Training, file_name
from dataflex.comparison.ready import Comparison
from dataflex.config import RunConfig, needed
from dataflex.data.catalog import find_sources
from dataflex.data.subset import subset_records, take_records
from dataflex.evaluation.run import evaluate
from dataflex.files import json_lines, read_jsonl, write_json, write_text
from dataflex.fingerprints import adapter_fingerprint
from dataflex.influence.score_file import read_scores
from dataflex.influence.scoring import score
from dataflex.origin import Origin, origin
from dataflex.provenance import Stopwatch
from dataflex.selectors.table import parts_of, reads_of
from dataflex.training.runs import train, warmup


def needs_warmup(config: RunConfig) -> bool:
    """Whether the selector looks at an adapter that has to be trained first."""
    return "adapter" in reads_of(config.selector) and not config.checkpoint


def _is_the_same_for_all_seeds(config: RunConfig) -> bool:
    return "adapter" not in reads_of(config.selector) and RANDOM not in parts_of(config.selector)


class Pieces:
    """The pieces in the folder of a comparison. Every process calls each method."""

    def __init__(self, ready: Comparison, watch: Stopwatch) -> None:
        self.ready, self.watch = ready, watch
        self.config, self.folder, self.progress = ready.config, ready.folder, ready.progress

    def run_folder(self, training: Training) -> Path:
        """Where the adapter of a training is."""
        return self.folder / f"seed-{training.seed}" / "runs" / training.name

    def scores(self, name: str, seed: int) -> np.ndarray:
        """[N] the scores of the pool's rows; NaN where a row has none."""
        own = self.ready.selectors[name].changed(seed=seed)
        place = self.folder if _is_the_same_for_all_seeds(own) else self.folder / f"seed-{seed}"
        path = place / "scores" / f"{file_name(name)}.jsonl"
        changes: dict[str, Any] = {"output": str(path), "overwrite": True, "component_name": own.selector}
        if needs_warmup(own):
            changes["checkpoint"] = [str(self._warmup(seed))]
        own = own.changed(**changes)
        content = {key: value for key, value in needed(self.ready.came_from).content.items() if key != "held_out"}
        content["checkpoint"] = ", ".join(adapter_fingerprint(path) for path in own.checkpoint or []) or None
        with self.watch.phase("scores"):
            self._unless_made(path, origin(own, "score", content, {}), lambda: score(own, self.progress))
        found = read_scores(path)
        scores = np.full(len(self.ready.rows), np.nan)
        scores[np.searchsorted(self.ready.rows, found.row)] = found.score
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

    def loss_after(self, training: Training) -> np.ndarray:
        """[held-out rows] losses after a training."""
        subset, result = self._files(training)
        if self.is_made(training):
            return self._losses(result)
        folder = self.run_folder(training)
        if processes.rank() == 0 and not self._holds(subset, training):
            shutil.rmtree(folder, ignore_errors=True)  # the run of other rows
            result.unlink(missing_ok=True)
            self._write_subset(subset, training)
        processes.barrier()
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
        rows = len(training.indices)
        self.progress.say(f"{training.name}, seed {training.seed}: held-out loss {loss.mean():.4f} after {rows} rows")
        return loss

    def is_made(self, training: Training) -> bool:
        """Whether an earlier call has measured this training."""
        subset, result = self._files(training)
        return processes.broadcast(processes.rank() == 0 and result.is_file() and self._holds(subset, training))

    def _files(self, training: Training) -> tuple[Path, Path]:
        """The subset that is trained on, and the result of the evaluation."""
        place = self.folder / f"seed-{training.seed}"
        return place / "subsets" / f"{training.name}.jsonl", place / "evals" / f"{training.name}.json"

    def _holds(self, subset: Path, training: Training) -> bool:
        """Whether the file has the rows of `training`, in order."""
        if not subset.is_file():
            return False
        rows = [line["dataflex"]["row"] for line in read_jsonl(subset, "subset")]
        return rows == self.ready.rows[training.indices].tolist()

    def _write_subset(self, path: Path, training: Training) -> None:
        rows = self.ready.rows[training.indices].tolist()
        sources = find_sources(needed(self.config.dataset), self.config.dataset_dir)
        taken, _ = take_records(sources, rows, expected=int(self.ready.rows[-1]) + 1, progress=self.progress)
        records = subset_records([taken[row] for row in rows], rows)
        lines = json_lines(
            path, ({**record, "dataflex": {"row": row}} for record, row in zip(records, rows, strict=True))
        )
        write_text(path, "".join(lines))

    def untouched(self) -> np.ndarray:
        """[held-out rows] losses of the model as it is."""
        result = self.folder / f"{UNTOUCHED}.json"
        return self._losses(result) if processes.broadcast(result.is_file()) else self._evaluate(result)

    def _evaluate(self, result: Path, **changes: Any) -> np.ndarray:
        rows = result.with_suffix(".rows.jsonl")
        # that no held-out row was trained on has been looked at
        files = {"output": str(result), "rows": str(rows), "overwrite": False, "export": None}
        own = self.config.changed(**files, allow_overlap=True, **changes)
        if "max_new_tokens" not in own.model_fields_set:
            own = own.changed(max_new_tokens=0)
        with self.watch.phase("evaluation"):
            evaluate(own, self.progress)
        return self._losses(result)

    def _losses(self, result: Path) -> np.ndarray:
        return np.array([line["loss"] for line in read_jsonl(result.with_suffix(".rows.jsonl"), "held-out rows")])
