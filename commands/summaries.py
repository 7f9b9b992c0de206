"""What several commands print: of scores their spread by dataset and the best rows, of a run what it picked."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.commands.console import Console
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from dataflex.data.records import Source
    from dataflex.influence.scores import Scores

BARS = " ▁▂▃▄▅▆▇█"
MOST_SHOWN = 5  # best rows
MOST_SELECTIONS = 12  # in the closing table; all of them are in run.json
WIDE = 100  # columns of a terminal that has room for longer histograms


def show_scores(console: Console, title: str, scores: Scores, chosen: Sequence[int] | None = None) -> None:
    """A line a dataset: rows, how many are `chosen`, lowest, median and best score, and a histogram from the lowest to
    the best score of all rows. A line a subtask where there are several."""
    from dataflex.influence.scores import winners

    names = np.array(scores.dataset or [""] * len(scores.row), dtype=object)
    edges = np.histogram_bin_edges(scores.score, 16 if console.err.width >= WIDE else 8)
    table = []
    for name in dict.fromkeys(names.tolist()):
        own = scores.score[names == name]
        picked = [int((names[list(chosen)] == name).sum())] if chosen is not None else []
        low, middle, high = np.quantile(own, (0, 0.5, 1)).tolist()
        table.append([*_named(scores, name), len(own), *picked, low, middle, high, histogram(own, edges)])
    counts = ["rows", "selected"] if chosen is not None else ["rows"]
    console.table(title, [*_named(scores, "dataset"), *counts, "lowest", "median", "best", "low to high"], table)
    if len(scores.subtasks) > 1:
        rows = [
            [name, count, int(scores.row[best]), float(scores.subtasks[name][best])]
            for name, (count, best) in winners(scores).items()
        ]
        console.table("rows by best subtask", ["subtask", "rows", "best row", "its score"], rows)


def show_best_and_worst(
    console: Console, scores: Scores, find: Callable[[], Sequence[Source]], files: str | None
) -> None:
    """The best and the worst rows as text; the best ones by number where `find` finds no source, or others than those
    that were scored. `files` is the hash of these, where it is known."""
    from dataflex.influence.scores import ranking
    from dataflex.reporting.scores import best_and_worst_as_text

    try:
        if sources := find():
            for kind, entries in best_and_worst_as_text(scores, None, sources, console, MOST_SHOWN, files).items():
                _show_rows(console, f"the {kind} rows", entries)
            return
    except UsageError as reason:
        console.warning(f"no row is shown as text: {reason}")
    show_best(console, scores, ranking(scores.row, scores.score))


def show_best(console: Console, scores: Scores, order: Sequence[int] | np.ndarray) -> None:
    """The first rows of an `order` by number."""
    names = scores.dataset or [""] * len(scores.row)
    rows = [[int(scores.row[i]), *_named(scores, names[i]), float(scores.score[i])] for i in order[:MOST_SHOWN]]
    console.table("the best rows", ["row", *_named(scores, "dataset"), "score"], rows)


def show_subset(console: Console, path: Path, records: Iterable[dict[str, Any]], titles: tuple[str, str]) -> None:
    """The first and the last of a subset's records as text, a title above each; no record is in both."""
    from dataflex.reporting.scores import subset_as_text

    records = iter(records)
    first = list(itertools.islice(records, MOST_SHOWN))
    last = list(collections.deque(records, maxlen=MOST_SHOWN))
    for title, shown in zip(titles, (first, last), strict=True):
        if shown:
            _show_rows(console, title, subset_as_text(path, shown))


def _named(scores: Scores, name: str) -> list[str]:
    """The cell of a dataset's name, where several are told apart."""
    return [name] if scores.dataset else []


def _show_rows(console: Console, title: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """A line a row, cut at the width of the terminal."""
    lines = []
    for entry in entries:
        text = " → ".join(" ".join(turn["text"].split()) for turn in entry.get("turns", []))
        score = f"{entry['score']:7.4f}" if "score" in entry else ""
        lines.append(f"{entry.get('row', '')!s:>7}  {score}  {text}")
    console.lines(title, lines)


def show_run(console: Console, folder: Path, run: Mapping[str, Any]) -> None:
    """What a finished run of `dynamic` picked, what that did, and where it is."""
    pool, made = run["pool"], run["selections"]
    rows = [["the pool", run["rows"], *[_share(count, run["rows"]) for count in pool.values()]]]
    for one in made if len(made) <= MOST_SELECTIONS else [*made[: MOST_SELECTIONS - 1], made[-1]]:
        rows.append(
            [f"picked at step {one['step']}", one["rows"], *[_share(one["picked"][name], one["rows"]) for name in pool]]
        )
    if len(made) > MOST_SELECTIONS:
        rows.insert(-1, [f"… {len(made) - MOST_SELECTIONS} more", "", *["" for _ in pool]])
    console.table("What was picked", ["", "rows", *pool], rows)
    others = run.get("others")
    console.facts(
        "The run",
        {
            "optimizer steps": f"{run['steps']}, {run['rows_per_step']} rows each",
            "selections": f"{len(made)}, listed in {folder}/selections/",
            f"loss on {run['eval_rows']} eval rows": _before_and_after(run["eval_loss"]),
            **({f"on {others['rows']} untrained rows": _before_and_after(others)} if others else {}),
            "seconds": ", ".join(f"{name} {value:.0f}" for name, value in run["seconds"].items()),
            "adapter, logs, checkpoints": f"{folder}/",
            **({"page": f"{folder}/report.html"} if (folder / "report.html").is_file() else {}),
        },
    )


def _before_and_after(loss: Mapping[str, float | None]) -> str:
    """Two losses; one that was not finite is None in run.json."""
    shown = {name: "not finite" if loss.get(name) is None else f"{loss[name]:.4f}" for name in ("before", "after")}
    return f"{shown['before']} before, {shown['after']} after"


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f}%)"


def histogram(values: np.ndarray, edges: np.ndarray) -> str:
    """A bar a bin; a bin with any value has at least the lowest bar."""
    counts = np.histogram(values, edges)[0]
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // max(1, int(counts.max())))] for count in counts)
