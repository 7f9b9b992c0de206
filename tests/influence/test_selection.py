"""Which rows are taken, and that they come out as they stand in their source."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex import load_config, select
from dataflex.data.catalog import find_sources
from dataflex.data.records import data_hash
from dataflex.errors import UsageError
from dataflex.files import write_jsonl
from dataflex.influence.scores import Scores
from dataflex.influence.selection import choose
from dataflex.influence.sidecar import manifest_path, write_with_manifest


def scores(values: list[float]) -> Scores:
    return Scores(np.arange(len(values)) * 10, np.array(values), {})


def test_rules():
    made = scores([0.1, 0.5, 0.5, -0.2])
    assert choose(made, count=3).tolist() == [1, 2, 0]
    assert choose(made, top=0.5).tolist() == [1, 2]
    assert choose(made, top=0.01).tolist() == [1]
    assert choose(made, threshold=0.5).tolist() == [1, 2]
    assert len(choose(scores([0.0] * 100), top=0.29)) == 29  # 0.29 × 100 is 28.999999999999996


@pytest.mark.parametrize("rules", [{}, {"count": 1, "top": 0.5}, {"count": 5}, {"threshold": 0.6}])
def test_rules_that_cannot_be_followed(rules):
    with pytest.raises(UsageError):
        choose(scores([0.1, 0.5, 0.5, -0.2]), **rules)


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_rows_are_written_as_they_stood(tmp_path):
    source = [{"instruction": f"say {i}", "input": "", "output": "ö" * i, "extra": [i]} for i in range(1, 6)]
    data = write_lines(tmp_path / "data.jsonl", source)
    made = write_lines(tmp_path / "s.jsonl", [{"row": i, "score": [3, 1, 4, 1, 5][i]} for i in range(5)])
    options = {"scores": made, "data": data, "count": 3, "output": str(tmp_path / "subset.jsonl")}
    lines = [json.loads(line) for line in select(load_config(options=options)).read_text().splitlines()]
    assert [line.pop("dataflex") for line in lines] == [
        {"row": r, "score": s} for r, s in [(4, 5.0), (2, 4.0), (0, 3.0)]
    ]
    assert lines == [source[4], source[2], source[0]]

    with pytest.raises(UsageError, match="exists; give --overwrite"):
        select(load_config(options=options))
    plain = select(load_config(options={**options, "plain": True, "overwrite": True}))
    assert [json.loads(line) for line in plain.read_text().splitlines()] == [source[4], source[2], source[0]]


def test_scores_of_other_data_are_refused(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    made = write_lines(tmp_path / "s.jsonl", [{"row": 0, "score": 1}, {"row": 3, "score": 0}])
    options = {"scores": made, "data": data, "count": 1, "output": str(tmp_path / "subset.jsonl")}
    with pytest.raises(UsageError, match=r"row 3 is past the end of .*\(3 rows\)"):
        select(load_config(options=options))
    assert not (tmp_path / "subset.jsonl").exists()


@pytest.fixture
def made(tmp_path):
    """Scores with their manifest, and the data they were made from."""
    data = write_lines(tmp_path / "data.jsonl", [{"instruction": f"say {i}", "output": "b"} for i in range(4)])
    path = tmp_path / "s.jsonl"
    records = [{"row": i, "score": i / 4} for i in range(4)]
    came_from = {"files": data_hash(find_sources([data], "data"))}
    write_with_manifest(path, lambda: write_jsonl(path, records), 4, came_from)
    return path, {"scores": str(path), "data": data, "count": 1, "output": str(tmp_path / "subset.jsonl")}


def test_a_subset_says_what_it_came_from(made):
    _, options = made
    beside = manifest_path(select(load_config(options=options)))
    found = json.loads(beside.read_text())
    assert (found["rows"], found["count"], found["files"]) == (1, 1, found["scores"]["files"])
    assert found["scores"]["rows"] == 4


def test_data_that_changed_after_scoring_is_refused(made, tmp_path):
    _, options = made
    (tmp_path / "data.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace("say 2", "say more"))
    with pytest.raises(UsageError, match=r"s\.jsonl were made from other data than .*data\.jsonl.*or score it again"):
        select(load_config(options=options))
    assert not (tmp_path / "subset.jsonl").exists()


def test_scores_that_lost_rows_are_refused_and_edited_ones_are_taken(made):
    path, options = made
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(UsageError, match=r"s\.jsonl: 3 of 4 rows are left"):
        select(load_config(options=options))
    path.write_text("".join(lines).replace("0.75", "0.1"))
    assert '"row": 2' in select(load_config(options=options)).read_text()
    manifest_path(path).write_text("{")
    with pytest.raises(UsageError, match=r"s\.jsonl\.manifest\.json: not readable"):
        select(load_config(options={**options, "overwrite": True}))
