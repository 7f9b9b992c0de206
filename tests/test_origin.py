"""What two origins differ in, and the hashes by which files are known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import RunConfig
from dataflex.fingerprints import file_hashes
from dataflex.origin import Origin, origin
from dataflex.progress import Silent


def of(fingerprint: str = "f", facts: dict | None = None, **keys: object) -> Origin:
    return origin(RunConfig(**keys), "train", {"dataset": fingerprint}, {"dataset": facts or {}})


def test_a_key_that_an_origin_does_not_know_had_its_default() -> None:
    now = of()
    written = now.as_json()
    del written["keys"]["weight_decay"]  # as a version without the key wrote it
    assert Origin.from_json(written).differences(now) == []
    assert Origin.from_json(written).differences(of(weight_decay=0.5)) == ["weight_decay (0.0 then, 0.5 now)"]


def test_facts_say_why_a_fingerprint_is_another_and_decide_nothing() -> None:
    short, long = {"cutoff_len": 32, "data files": "a" * 64}, {"cutoff_len": 16, "data files": "b" * 64}
    assert of("f", short).differences(of("f", long)) == []
    assert of("f", short).differences(of("g", long)) == ["cutoff_len (32 then, 16 now)", "dataset: data files"]
    assert of("f", short).differences(of("g", short)) == ["dataset"]


def test_a_key_of_another_command_is_no_part_of_an_origin() -> None:
    assert of().differences(of(top=0.1, export_dir="x", update_step=3, logging_steps=2)) == []


@pytest.mark.parametrize("value", [None, {}, {"seed": 1}, {"keys": {}, "content": [], "facts": {}}])
def test_what_is_no_origin_is_told(value: object) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        Origin.from_json(value)


class Reads(Silent):
    """Counts how often files are read."""

    def __init__(self) -> None:
        self.count = 0

    def task(self, description: str, total: int, unit: str, *expected: Any):
        self.count += 1
        return super().task(description, total, unit, *expected)


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file, reads = tmp_path / "model.safetensors", Reads()

    def write(text: bytes, seconds_ago: int) -> str:
        file.write_bytes(text)
        now = file.stat().st_mtime
        os.utime(file, (now - seconds_ago, now - seconds_ago))
        return hashlib.sha256(text).hexdigest()

    first = write(b"one", 0)  # may change again within this tick of the clock, so its hash is not kept
    assert [file_hashes([file], reads) for _ in range(2)] == [[first]] * 2
    assert reads.count == 2
    second = write(b"two", 10)
    assert [file_hashes([file], reads) for _ in range(3)] == [[second]] * 3
    assert reads.count == 3
    third = write(b"six", 20)
    assert file_hashes([file], reads) == [third]
