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
