"""Held-out rows that stand in other data: against sets of shingles in plain Python, and in the commands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import dataflex
from dataflex.data.rows import Example
from dataflex.errors import UsageError
from dataflex.evaluation.overlap import MOST_HOLDERS, NEAR, SHINGLE, Overlap, find_overlaps
from dataflex.progress import SILENT


def example(tokens: Sequence[int]) -> Example:
    return Example(0, list(tokens), list(tokens), None, "data")


def slow(held_out: list[list[int]], others: list[list[int]]) -> dict[int, tuple[int, float]]:
    def shingles(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[start : start + SHINGLE]) for start in range(len(row) - SHINGLE + 1)}

    counts = Counter(shingle for row in held_out for shingle in shingles(row))
    common = {shingle for shingle, count in counts.items() if count > max(1, min(len(held_out) // 2, MOST_HOLDERS))}
    found = {}
    for index, row in enumerate(held_out):
        best = (-1, 0.0)
        for other, theirs in enumerate(others):
            mine, its = shingles(row) - common, shingles(theirs) - common
            likeness = 1.0 if row == theirs else len(mine & its) / max(1, len(mine | its))
            if likeness >= NEAR and likeness > best[1]:
                best = (other, likeness)
        if best[0] >= 0:
            found[index] = best
    return found


@pytest.mark.parametrize(("seed", "count"), [*((seed, 9) for seed in range(8)), (8, 60), (9, 60)])
def test_overlaps_are_those_of_plain_sets(seed: int, count: int) -> None:
    """Rows of few different tokens behind one opening; some others are held-out rows with tokens changed or cut off."""
    generator = np.random.default_rng(seed)
    opening = generator.integers(0, 9, 12).tolist()
    held_out = [opening + generator.integers(0, 9, generator.integers(0, 60)).tolist() for _ in range(count)]
    if count > 2 * MOST_HOLDERS:  # a text that less than half of them share
        held_out[:25] = [[7] * 9 + row for row in held_out[:25]]
    others = [opening + generator.integers(0, 9, generator.integers(0, 60)).tolist() for _ in range(20)]
    for _ in range(30):
        row = list(held_out[generator.integers(len(held_out))])
        for _ in range(generator.integers(0, 4)):
            row[generator.integers(len(row))] = 9
        others.append(row[: len(row) - generator.integers(0, 5)])
    found = find_overlaps([example(row) for row in held_out], [example(row) for row in others], SILENT)
    wanted = slow(held_out, others)
    assert {one.index: (one.other, one.likeness) for one in found} == {
        index: (other, pytest.approx(likeness)) for index, (other, likeness) in wanted.items()
    }
    assert wanted


def test_rows_shorter_than_a_shingle_are_found_whole_alone() -> None:
    found = find_overlaps([example([1, 2]), example([1, 2, 3])], [example([1]), example([1, 2])], SILENT)
    assert found == [Overlap(0, 1, 1.0)]


@pytest.fixture
def files(data_dir: Path, tmp_path: Path) -> Path:
    """Rows to train on, and held-out rows: one of them the same, one with another word in it, one of its own."""
    records = json.loads((data_dir / "alpaca_en_demo.json").read_text())
    long = [record for record in records if len(record["output"].split()) > 60]
    changed = {**long[1], "output": long[1]["output"].replace(" ", "  ", 1)}
    (tmp_path / "train.json").write_text(json.dumps(long[:40]))
    (tmp_path / "held_out.json").write_text(json.dumps([long[50], long[3], changed]))
    return tmp_path


def test_seen_rows_are_refused_by_name(files: Path, tiny_run: dict) -> None:
    options = {
        **tiny_run, "dataset": str(files / "train.json"), "max_samples": None, "cutoff_len": 200, "eval_dataset": None,
        "held_out": str(files / "held_out.json"), "output": str(files / "eval.json"), "max_new_tokens": 0,
    }  # fmt: skip
    config = dataflex.load_config(options=options)
    wanted = (
        r"2 of 3 held-out rows stand in the training data .*row 1 of \S+ is row 3 of .*; row 2 of \S+ is 9\d% row 1 of"
    )
    for command in (dataflex.evaluate, dataflex.compare):
        own = config.changed(eval_dataset=["identity"]) if command is dataflex.compare else config
        with pytest.raises(UsageError, match=wanted):
            command(own.changed(output=str(files / "out")))
    assert not (files / "out").exists() and not list(files.glob("*.partial"))
    with pytest.raises(UsageError, match="3 of 3 held-out rows stand in the validation data"):
        dataflex.evaluate(config.changed(dataset=None, eval_dataset=config.held_out))
    dataflex.evaluate(config.changed(allow_overlap=True))
    dataflex.evaluate(config.changed(dataset=["identity"], output=str(files / "other.json")))
