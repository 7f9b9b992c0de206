"""The rate and the time left that stand beside a bar."""

from __future__ import annotations

import datetime
import threading

from dataflex.commands.pace import Pace


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_below_one_a_second_is_seconds_of_one() -> None:
    clock = Clock()
    rows, steps = Pace(100, "rows", clock=clock), Pace(10, "steps", clock=clock)
    assert rows.rate() == "" and rows.left() == ""
    clock.now += 30
    rows.done, steps.done = 90, 2
    assert rows.rate() == "3.0 rows/s" and steps.rate() == "15.0 s/step"


def test_the_time_left_follows_the_mean_pace() -> None:
    """Steps of a minute: rich's own estimate looks at half a minute and knows nothing then."""
    clock = Clock()
    steps = Pace(10, "steps", clock=clock)
    clock.now += 120
    steps.done = 2
    assert steps.left() == "0:08:00"
    clock.now += 480
    steps.done = 10
    assert steps.left() == "0:00:00"


def test_what_an_earlier_run_did_says_nothing_of_the_pace() -> None:
    clock = Clock()
    steps = Pace(100, "steps", done=50, clock=clock)
    assert steps.rate() == "" and steps.left() == ""
    clock.now += 10
    steps.done += 1
    assert steps.rate() == "10.0 s/step" and steps.left() == "0:08:10"


def test_selections_are_counted_apart_from_steps() -> None:
    """Steps of 2 s, a first evaluation of 30 s, two selections of 60 s: once a selection has been seen, the time left
    is that of the schedule, to the second."""
    clock = Clock()
    steps = Pace(12, "steps", pauses={"selection": 2}, clock=clock)
    took = {0: ("first evaluation", 30.0), 4: ("selection", 60.0), 8: ("selection", 60.0)}
    end = clock.now + 12 * 2 + 30 + 60 + 60
    for step in range(12):
        if step in took:
            kind, seconds = took[step]
            with steps.pause(kind):
                clock.now += seconds / 2
                if step == 4:
                    assert steps.rate() == "2.0 s/step" and steps.left() == "over 0:00:16"
                if step == 8:
                    assert steps.rate() == "2.0 s/step" and steps.left() == "0:00:38"
                clock.now += seconds / 2
        clock.now += 2
        steps.done += 1
        assert steps.rate() == "2.0 s/step"
        known = f"{datetime.timedelta(seconds=int(end - clock.now))}"
        assert steps.left() == (f"over 0:00:{2 * (11 - step):02d}" if step < 4 else known)


def test_another_thread_may_read_it_at_any_moment() -> None:
    """rich draws the bars in a thread of its own."""
    steps, failed, ended = Pace(10**6, "steps", pauses={"selection": 1}), [], threading.Event()

    def draw() -> None:
        while not ended.is_set():
            try:
                steps.rate(), steps.left()
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    for number in range(20_000):
        with steps.pause(f"kind {number % 40}"):
            steps.done += 1
        if number % 40 == 0:
            steps._to_begin.clear()
    ended.set()
    thread.join()
    assert not failed
