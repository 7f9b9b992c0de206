"""The one-line summary of a split."""

from __future__ import annotations

from dataflex.data.report import Report


def test_the_summary_names_reasons_and_their_first_rows():
    report = Report(seen=10, kept=7, truncated=2, lost_end=1, dropped={"no response": [3, 5], "empty": [9]})
    assert report.summary("train data") == (
        "train data: 7 of 10 rows; 2 dropped, no response (first: row 3); 1 dropped, empty (first: row 9); "
        "2 truncated, 1 of them without their end"
    )
    assert Report(seen=4, kept=4).summary("eval data") == "eval data: 4 of 4 rows"


def test_what_is_lost_or_not_read_is_a_warning_each() -> None:
    report = Report(seen=9, kept=8, lost={"the system text": [2, 5]}, left_out={"column 'x'": [1], "tool results": [3]})
    lost, column, results = report.warnings("train data")
    assert lost.startswith("train data: the system text cannot be found in the tokens of 2 of 8 rows (first: row 2); ")
    assert column == (
        "train data: not read: column 'x', in 1 of 8 rows (first: row 1); "
        "name it in `columns` if it is meant (naming some unsets the others)"
    )
    assert results == "train data: not read: tool results, in 1 of 8 rows (first: row 3)"
    assert report.problems() == ["row 2: the system text cannot be found in the tokens (2 rows so)"]


def test_reasons_that_differ_in_the_turn_alone_are_told_together() -> None:
    report = Report(dropped={"turn 4 (user): x": [7], "turn 2 (user): x": [3, 9], "turn 2 (user): y": [5]})
    assert report.problems() == ["row 3: turn 2 (user): x (3 rows so)", "row 5: turn 2 (user): y (1 rows so)"]
