from __future__ import annotations

from dataflex.data.preview import first_row, spans, summary
from dataflex.data.report import Report
from dataflex.data.rows import Example


def test_spans_are_cut_where_supervision_changes(tokenizer) -> None:
    texts = ["<|im_start|>user\nHi<|im_end|>", "Hé", "\nmore", "end<|im_end|>"]
    pieces = [tokenizer.encode(text) for text in texts]
    ids = [token for piece in pieces for token in piece]
    labels = [token if number % 2 else -100 for number, piece in enumerate(pieces) for token in piece]
    example = Example(3, ids, labels, None, "d")
    assert spans(example, tokenizer) == [(text, number % 2 == 1) for number, text in enumerate(texts)]
    shown = first_row([example], tokenizer)
    assert (shown["row"], shown["dataset"]) == (3, "d")
    assert shown["spans"][1] == {"text": "Hé", "supervised": True}


def test_summary() -> None:
    report = Report(5, 3, 1, 1, 12, [10, 20, 30], {"no response": [4, 6]}, {"thoughts": [1, 2]}, {"field 'x'": [0]})
    assert summary(report) == {
        "rows": 5,
        "kept": 3,
        "dropped": {"no response": 2},
        "first_dropped": {"no response": 4},
        "lost": {"thoughts": 2},
        "left_out": {"field 'x'": 1},
        "truncated": 1,
        "lost_end": 1,
        "tokens": 60,
        "supervised_tokens": 12,
        "longest": 30,
        "lengths": {"min": 10, "50%": 20, "90%": 30, "99%": 30, "max": 30},
    }
