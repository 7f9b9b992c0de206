"""What `score`, `select` and `inspect` print of scores: their spread by dataset, and the best rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dataflex.commands.console import Console
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from dataflex.data.records import Source
    from dataflex.influence.scores import Scores

BARS = " ▁▂▃▄▅▆▇█"
MOST_SHOWN = 5
WIDE = 100  # columns of a terminal that has room for longer histograms


def show_scores(
    console: Console,
    title: str,
    scores: Scores,
    chosen: Sequence[int] | None = None,
    sources: Sequence[Source] = (),
    files: str | None = None,
) -> None:
    """A line a dataset: rows, how many are `chosen`, lowest, median and best score, and a histogram from the lowest to
    the best score of all rows. A line a subtask where there are several. Then the best rows, or the best and the worst
    as text where their `sources` are given; `files` is the hash of these when they were scored."""
    from dataflex.influence.scores import ranking, winners

    names = np.array(scores.dataset or ["rows"] * len(scores.row), dtype=object)
    edges = np.histogram_bin_edges(scores.score, 16 if console.err.width >= WIDE else 8)
    table = []
    for name in dict.fromkeys(names.tolist()):
        own = scores.score[names == name]
        picked = [int((names[list(chosen)] == name).sum())] if chosen is not None else []
        low, middle, high = np.quantile(own, (0, 0.5, 1)).tolist()
        table.append([name, len(own), *picked, low, middle, high, histogram(own, edges)])
    counts = ["rows", "selected"] if chosen is not None else ["rows"]
    console.table(title, ["dataset", *counts, "lowest", "median", "best", "low to high"], table)
    if len(scores.subtasks) > 1:
        rows = [
            [name, count, int(scores.row[best]), float(scores.subtasks[name][best])]
            for name, (count, best) in winners(scores).items()
        ]
        console.table("rows by best subtask", ["subtask", "rows", "best row", "its score"], rows)
    if sources:
        try:
            return _show_text(console, scores, sources, files)
        except UsageError as reason:
            console.warning(f"no row is shown as text: {reason}")
    best = ranking(scores.row, scores.score)[:MOST_SHOWN] if chosen is None else list(chosen)[:MOST_SHOWN]
    rows = [[int(scores.row[i]), names[i], float(scores.score[i])] for i in best]
    console.table("the best rows", ["row", "dataset", "score"], rows)


def _show_text(console: Console, scores: Scores, sources: Sequence[Source], files: str | None) -> None:
    """The best and the worst rows as text, a line each that is cut at the width of the terminal."""
    from dataflex.reporting.scores import best_and_worst_as_text

    for kind, entries in best_and_worst_as_text(scores, None, sources, console, MOST_SHOWN, files).items():
        lines = []
        for entry in entries:
            text = " → ".join(" ".join(turn["text"].split()) for turn in entry.get("turns", []))
            lines.append(f"{entry['row']:>7}  {entry['score']:7.4f}  {text}")
        console.lines(f"the {kind} rows", lines)


def histogram(values: np.ndarray, edges: np.ndarray) -> str:
    """A bar a bin; a bin with any value has at least the lowest bar."""
    counts = np.histogram(values, edges)[0]
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // max(1, int(counts.max())))] for count in counts)
