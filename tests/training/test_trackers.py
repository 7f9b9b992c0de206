"""What a tracker is shown of a run, read back from a real TensorBoard log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataflex
from dataflex.influence.score_table import read_score_table
from dataflex.influence.scores import length_correlation


@pytest.fixture(scope="module")
def folder(tiny_run: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**tiny_run, "dataset": "alpaca_en_demo,identity", "report_to": "tensorboard", "report": False}
    folder = tmp_path_factory.mktemp("tracked")
    options |= {"output_dir": str(folder / "out"), "logging_dir": str(folder / "log")}
    dataflex.dynamic(dataflex.load_config(options=options))
    return folder


def test_a_tracker_is_shown_each_selection(folder: Path) -> None:
    """At the step that it was made before, with the figures that its files give."""
    log = EventAccumulator(str(folder / "log"))
    log.Reload()
    shown = {
        name.removeprefix("train/"): {event.step: event.value for event in log.Scalars(name)}
        for name in log.Tags()["scalars"]
    }
    assert len(shown["loss"]) == 7  # the loss of training is still there
    chosen: dict[int, list[int]] = {}
    for step in (3, 5):
        selections = folder / "out" / "selections"
        lines = [json.loads(line) for line in (selections / f"step-{step}.jsonl").read_text().splitlines()]
        scores, tokens = read_score_table(selections / f"step-{step}.parquet")
        chosen[step] = [line["row"] for line in lines]
        wanted = {
            "score_lowest": scores.score.min(),
            "score_median": np.median(scores.score),
            "score_best": scores.score.max(),
            "length_correlation": length_correlation(scores.score, tokens),
            **{
                f"share/{name}": np.mean([line["dataset"] == name for line in lines])
                for name in {line["dataset"] for line in lines}
            },
        }
        for name, value in wanted.items():
            assert shown[f"selection/{name}"][step] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert shown["selection/seconds"][step] > 0
    overlap = np.mean([row in chosen[3] for row in chosen[5]])
    assert shown["selection/overlap"] == pytest.approx({5: overlap})


def test_the_history_of_training_is_not_mixed_with_them(folder: Path) -> None:
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert not [entry for entry in history if any(key.startswith("selection") for key in entry)]
