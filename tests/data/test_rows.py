from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.data.rows import Example, Outcome, Rows, as_batch, write_batches

OUTCOMES = [
    Outcome(0, 0, None, [1, 2, 3], [-100, 2, 3], 2, truncated=True, lost_end=True),
    Outcome(1, 0, reason="no response"),
    Outcome(4, 0, "x", [5, 6], [5, 6], 1, truncated=True),
    Outcome(7, 1, "second", [70_000], [70_000], 0),
    Outcome(8, 1, reason="no response"),
    Outcome(9, 1, reason="other"),
]
EXAMPLES = [
    Example(0, [1, 2, 3], [-100, 2, 3], None, "first"),
    Example(4, [5, 6], [5, 6], "x", "first"),
    Example(7, [70_000], [70_000], "second", "second"),
]


@pytest.fixture(params=[1, 2, 6])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Rows:
    """The outcomes in batches of several sizes: where a batch ends shows nowhere."""
    path = tmp_path / "rows.arrow"
    with open(path, "wb") as handle:
        starts = range(0, len(OUTCOMES), request.param)
        write_batches(handle, (as_batch(OUTCOMES[start : start + request.param]) for start in starts))
    rows = Rows(path, ["first", "second"])
    path.unlink()  # what is mapped stays
    return rows


def test_rows_are_a_sequence_of_examples(rows: Rows) -> None:
    assert len(rows) == 3
    assert list(rows) == [rows[0], rows[1], rows[2]] == EXAMPLES
    assert (rows[-1], rows[1:], rows[::-2]) == (EXAMPLES[-1], EXAMPLES[1:], EXAMPLES[::-2])
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            rows[beyond]
    assert all(type(token) is int for token in rows[0].input_ids + rows[0].labels + [rows[0].row])


def test_the_report_tells_of_every_row(rows: Rows) -> None:
    report = rows.report()
    assert (report.seen, report.kept, report.truncated, report.lost_end) == (6, 3, 2, 1)
    assert (report.supervised_tokens, report.lengths) == (3, [3, 2, 1])
    assert report.dropped == {"no response": [1, 8], "other": [9]}


def test_no_rows(tmp_path: Path) -> None:
    with open(tmp_path / "rows.arrow", "wb") as handle:
        write_batches(handle, [])
    rows = Rows(tmp_path / "rows.arrow", [])
    assert (list(rows), rows.report().seen) == ([], 0)
