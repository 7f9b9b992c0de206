from __future__ import annotations

import pytest

from dataflex.data.encoding import encode_row, fit_turn

TURNS = [([1, 2, 3], [4, 5]), ([6, 7], [8, 9])]
X = -100


def test_responses_are_supervised() -> None:
    row = encode_row(TURNS, 100)
    assert row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.labels == [X, X, X, 4, 5, X, X, 8, 9]
    assert (row.truncated, row.lost_end) == (False, False)


def test_train_on_prompt_supervises_all() -> None:
    assert encode_row(TURNS, 100, train_on_prompt=True).labels == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_mask_history_supervises_the_last_response_and_keeps_it() -> None:
    assert encode_row(TURNS, 100, mask_history=True).labels == [X, X, X, X, X, X, X, 8, 9]
    row = encode_row(TURNS, 4, mask_history=True)
    assert (row.input_ids, row.labels) == ([6, 7, 8, 9], [X, X, 8, 9])
    assert (row.truncated, row.lost_end) == (True, False)


def test_turns_after_the_budget_is_spent_are_left_out() -> None:
    row = encode_row(TURNS, 5)
    assert row.input_ids == [1, 2, 3, 4, 5]
    assert (row.truncated, row.lost_end) == (True, True)


def test_efficient_eos_ends_the_row_and_marks_the_turns() -> None:
    row = encode_row(TURNS, 100, efficient_eos=0)
    assert row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert row.labels == [X, X, X, 4, 5, 0, X, 8, 9, 0]
    assert len(encode_row(TURNS, 4, efficient_eos=0).input_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "response", "room", "kept"),
    [
        (10, 4, 100, (10, 4)),
        (100, 4, 20, (16, 4)),  # a short response stays whole
        (4, 100, 20, (4, 16)),  # else a short prompt does
        (30, 10, 20, (15, 5)),  # else both shrink in proportion
        (11, 13, 7, (4, 3)),
        (5, 0, 3, (3, 0)),
        (0, 5, 3, (0, 3)),
        (0, 0, 1, (0, 0)),
        (1, 1, 1, (1, 0)),
    ],
)
def test_fit_turn(prompt: int, response: int, room: int, kept: tuple[int, int]) -> None:
    assert fit_turn(prompt, response, room) == kept


def test_a_row_never_outgrows_cutoff_len() -> None:
    for cutoff_len in range(1, 12):
        for mask_history in (False, True):
            row = encode_row(TURNS, cutoff_len, mask_history=mask_history)
            assert len(row.input_ids) == len(row.labels) <= cutoff_len
            assert row.truncated == (len(row.input_ids) < 9)
            assert all(label in (X, token) for label, token in zip(row.labels, row.input_ids, strict=True))
