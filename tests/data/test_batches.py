from __future__ import annotations

import random

import pytest

from dataflex.data.batches import collate, token_batches
from dataflex.data.examples import Example


@pytest.mark.parametrize("budget", [1, 50, 200, 10_000])
def test_every_row_once_within_the_budget(budget: int) -> None:
    lengths = [random.Random(0).randrange(1, 120) for _ in range(200)] + [120] * 5
    batches = token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(205))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_cut_and_ties() -> None:
    assert token_batches([3, 9, 3, 3, 2], 9) == [[1], [0, 2, 3], [4]]
    assert token_batches([5, 5, 5], 10) == [[0, 1], [2]]
    assert token_batches([], 10) == []


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example(0, [1, 2, 3], [-100, 2, 3], None, "a"), Example(1, [4], [4], None, "a")], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
