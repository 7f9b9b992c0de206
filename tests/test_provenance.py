"""Clocks of a run."""

from __future__ import annotations

import pytest

from dataflex import provenance
from dataflex.provenance import Stopwatch


def test_each_second_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(provenance.time, "monotonic", lambda: now[0])
    watch = Stopwatch()

    def wait(seconds: float) -> None:
        now[0] += seconds

    wait(100)  # outside
    with watch.phase("training"):
        wait(1)
        with watch.phase("evaluation"):
            wait(2)
        wait(4)
        with pytest.raises(KeyError), watch.phase("selection"):
            wait(8)
            with watch.phase("evaluation"):
                wait(16)
            raise KeyError
        wait(32)
    wait(100)
    with watch.phase("evaluation"):
        wait(64)
    assert watch.seconds == {"training": 37.0, "evaluation": 82.0, "selection": 8.0}
