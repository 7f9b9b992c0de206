"""The schedule of `dynamic` and the rows of each step: pure functions, so plain numbers."""

from __future__ import annotations

import pytest

from dataflex import load_config
from dataflex.errors import UsageError
from dataflex.training.schedule import dynamic_schedule, random_rows, scheduled_rows, training_steps


def schedule(**options):
    return dynamic_schedule(load_config(options=options))


def test_the_seed_yaml(repo, monkeypatch):
    monkeypatch.chdir(repo)
    made = dynamic_schedule(load_config("examples/less.yaml"))
    assert (made.total_steps, made.selection_steps, made.rows_per_selection) == (30, [10, 20], 10)


@pytest.mark.parametrize(
    ("options", "steps", "selections"),
    [
        ({"num_train_epochs": 2.0}, 60, [10, 20, 30, 40, 50]),
        ({"num_train_epochs": 0.1}, 3, []),
        ({"num_train_epochs": 0.5}, 15, [10]),
        ({"num_train_epochs": 1.0, "max_steps": 25}, 25, [10, 20]),
        ({"num_train_epochs": 1.0, "train_step": 12, "max_steps": 25}, 12, [10]),
        ({"num_train_epochs": 1.0, "warmup_step": 0}, 20, [0, 10]),
        ({"num_train_epochs": 1.0, "update_times": 0}, 10, []),
    ],
)
def test_steps_and_selections(options, steps, selections):
    made = schedule(**options)
    assert (made.total_steps, made.selection_steps) == (steps, selections)


def test_a_run_without_steps_is_refused():
    with pytest.raises(UsageError, match="no steps"):
        schedule(warmup_step=0, update_times=0)


def test_rows_a_step_counts_accumulation_and_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = schedule(per_device_train_batch_size=3, gradient_accumulation_steps=4, update_step=5)
    assert (made.rows_per_step, made.rows_per_selection) == (24, 120)


def test_random_rows_pass_over_all_rows_before_any_comes_again():
    rows = [row for step in range(5) for row in random_rows(step, 4, 10, seed=1)]
    assert sorted(rows[:10]) == list(range(10))
    assert sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert random_rows(3, 4, 10, seed=1) == random_rows(3, 4, 10, seed=1)
    assert random_rows(0, 4, 10, seed=1) != random_rows(0, 4, 10, seed=2)


def test_selected_rows_are_all_trained_on_once_in_shuffled_order():
    made = schedule(num_train_epochs=1.0, per_device_train_batch_size=2, warmup_step=3, update_step=4)
    chosen = list(range(100, 108))
    rows = [row for step in range(3, 7) for row in scheduled_rows(made, step, 500, 42, {3: chosen})]
    assert sorted(rows) == chosen
    assert rows != chosen
    assert scheduled_rows(made, 0, 500, 42, {}) == random_rows(0, 2, 500, 42)


def test_training_steps():
    config = load_config(options={"num_train_epochs": 3.0, "per_device_train_batch_size": 4})
    assert training_steps(config, 10) == 9
    assert training_steps(config.changed(max_steps=2), 10) == 2
