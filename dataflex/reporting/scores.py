"""The figures of scores: quantiles, histograms by dataset, the best and the worst rows as text, the part of length."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.data.catalog import recognise
from dataflex.data.conversations import Unusable, to_conversation
from dataflex.data.records import Source
from dataflex.data.subset import Taken, take_records
from dataflex.errors import UsageError
from dataflex.influence.scores import Scores, length_correlation, ranking
from dataflex.progress import Progress

BINS = 30
SHOWN = 10  # best and worst rows
MOST_NAMED = 7  # datasets told apart; the others are counted together
LONGEST_TEXT = 1500  # characters of a turn
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
OTHERS = "other datasets"


def figures_of_scores(scores: Scores, tokens: np.ndarray | None) -> dict[str, Any]:
    """Quantiles, a histogram by dataset, and Spearman's correlation with the supervised tokens [N], where known."""
    good = np.isfinite(scores.score)
    values = scores.score[good]
    names = np.array(scores.dataset if scores.dataset is not None else ["rows"] * len(good), dtype=object)[good]
    found, counts = np.unique(names.astype(str), return_counts=True)
    largest = found[np.argsort(-counts, kind="stable")]
    named = largest if len(largest) <= MOST_NAMED + 1 else largest[:MOST_NAMED]
    edges = np.histogram_bin_edges(values, BINS)
    histogram = {str(name): np.histogram(values[names == name], edges)[0].tolist() for name in named}
    if len(named) < len(largest):
        histogram[OTHERS] = np.histogram(values[~np.isin(names.astype(str), named)], edges)[0].tolist()
    return {
        "scored": int(good.sum()),
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "datasets": histogram},
        "length_correlation": None if tokens is None else length_correlation(scores.score, tokens),
    }


def best_and_worst(scores: Scores, shown: int = SHOWN) -> tuple[list[int], list[int]]:
    """Indices of the `shown` best rows, best first, and of the worst, worst first; no row is in both."""
    order = ranking(scores.row, scores.score)[: int(np.isfinite(scores.score).sum())]
    shown = min(shown, len(order) // 2)
    return order[:shown].tolist(), order[::-1][:shown].tolist()


def best_and_worst_as_text(
    scores: Scores,
    tokens: np.ndarray | None,
    sources: Sequence[Source],
    progress: Progress,
    shown: int = SHOWN,
    files: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """`best` and `worst`: each row with its score, dataset, supervised tokens and turns, a turn cut at LONGEST_TEXT
    characters. The sources are read once.

    Args:
        files: the hash of the data's files when they were scored, where that is known.

    Raises:
        UsageError: the sources have another hash, so that a row number may be another row's.
    """
    best, worst = best_and_worst(scores, shown)
    indices = [*best, *worst]
    rows = [int(scores.row[index]) for index in indices]
    digest = hashlib.sha256()
    taken, _ = take_records(sources, rows, digest, expected=int(scores.row.max()) + 1, progress=progress)
    if files not in (None, digest.hexdigest()):
        names = ", ".join(source.name for source in sources)
        raise UsageError(f"the scores were made from other data than {names}; name the data as it was scored")
    found = []
    for index, row in zip(indices, rows, strict=True):
        entry: dict[str, Any] = {"row": row, "score": float(scores.score[index])}
        if row in taken:
            entry |= as_text(taken[row])
        if tokens is not None:
            entry["tokens"] = int(tokens[index])
        found.append(entry)
    return {"best": found[: len(best)], "worst": found[len(best) :]}


def as_text(taken: Taken) -> dict[str, Any]:
    """`dataset` and `turns` of a record, a turn cut at LONGEST_TEXT characters."""
    source, record = taken
    return {"dataset": source.name, "turns": _turns(source, record)}


def subset_as_text(path: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the subset `path` as `best_and_worst_as_text` gives rows; `row` and `score` where they hold them."""
    found = []
    for record in records:
        entry = {key: value for key, value in (record.get("dataflex") or {}).items() if key in ("row", "score")}
        with contextlib.suppress(UsageError):  # of no format that is known from its first record
            entry |= as_text((recognise(path.name, path, record), record))
        found.append(entry)
    return found


def _turns(source: Source, record: dict[str, Any]) -> list[dict[str, str]]:
    try:
        conversation = to_conversation(source, record)
    except Unusable as reason:
        return [{"role": "not usable", "text": str(reason)}]
    turns = [("system", conversation.system)] if conversation.system else []
    turns += [(message.role, message.content) for message in conversation.messages]
    return [{"role": role, "text": _cut(text)} for role, text in turns]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text)} characters)"
