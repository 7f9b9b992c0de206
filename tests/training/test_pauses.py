"""The pauses that a training announces are those that it makes, so that the time left can count them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import dataflex
from dataflex.progress import Silent


class Recorder(Silent):
    """Keeps what the task "training" announced and did, and ends the run after `after` steps."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.begun_with = after, 0
        self.announced: Mapping[str, int] = {}
        self.made: Counter[str] = Counter()

    @contextlib.contextmanager
    def task(
        self, description: str, total: int, unit: str, done: int = 0, pauses: Mapping[str, int] | None = None
    ) -> Iterator[Any]:
        if description == "training":
            self.announced, self.begun_with = pauses or {}, done
            yield self
        else:
            with super().task(description, total, unit) as task:
                yield task

    def advance(self, amount: int = 1, **shown: float) -> None:
        if self.after is not None and amount:
            self.after -= amount
            if self.after < 0:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        self.made[kind] += 1
        yield


EVALUATIONS: list[dict[str, object]] = [
    {"eval_strategy": "steps", "eval_steps": 3},  # 7 steps, so that the last evaluation is out of turn
    {"eval_strategy": "steps", "eval_steps": 0.3},
    {"eval_strategy": "epoch", "num_train_epochs": 1.5},
    {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 4, "eval_on_start": True},
]


@pytest.mark.parametrize("evaluations", EVALUATIONS)
def test_announced_pauses_are_made(evaluations: dict, tiny_run: dict, tmp_path: Path) -> None:
    """Of a whole run, and of the rest of one that was cut off."""
    config = dataflex.load_config(
        options={**tiny_run, **evaluations, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    )
    cut = Recorder(after=4)
    with pytest.raises(KeyboardInterrupt):
        dataflex.dynamic(config, cut)
    rest = Recorder()
    dataflex.dynamic(config, rest)
    assert rest.begun_with > 0
    whole = Recorder()
    dataflex.dynamic(config.changed(output_dir=str(tmp_path / "whole")), whole)
    for run in (rest, whole):
        announced = {kind: number for kind, number in run.announced.items() if number}
        assert announced == {kind: number for kind, number in run.made.items() if kind != "first evaluation"}
    assert whole.made["selection"] > 1 and whole.made["evaluation"] > 1 and whole.made["first evaluation"] == 1
