"""A split for a person to check: its counts, and one row as text, the supervised part told from the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from dataflex.data.encoding import UNSUPERVISED
from dataflex.data.report import Report
from dataflex.data.rows import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = {"min": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}


class Span(NamedTuple):
    """A stretch of a row's text. `supervised`: the model learns to write it."""

    text: str
    supervised: bool


def spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The decoded row with its special tokens, cut where supervision begins and ends."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [
        Span(str(tokenizer.decode([token for token, _ in group], skip_special_tokens=False)), supervised)
        for supervised, group in groupby(pairs, lambda pair: pair[1] != UNSUPERVISED)
    ]


def first_row(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The first row as `row`, `dataset` and its `spans`, in plain values."""
    first = examples[0]
    return {"row": first.row, "dataset": first.dataset, "spans": [span._asdict() for span in spans(first, tokenizer)]}


def summary(report: Report) -> dict[str, Any]:
    """The counts of a report; `first_dropped` has the first row of each reason."""
    return {
        "rows": report.seen,
        "kept": report.kept,
        "dropped": {reason: len(rows) for reason, rows in report.dropped.items()},
        "first_dropped": {reason: rows[0] for reason, rows in report.dropped.items()},
        "lost": {what: len(rows) for what, rows in report.lost.items()},
        "left_out": {what: len(rows) for what, rows in report.left_out.items()},
        "truncated": report.truncated,
        "lost_end": report.lost_end,
        "tokens": sum(report.lengths),
        "supervised_tokens": report.supervised_tokens,
        "longest": max(report.lengths, default=0),
        "lengths": {name: report.length_quantile(share) for name, share in QUANTILES.items()},
    }
