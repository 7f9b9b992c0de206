"""Every row's ids and labels equal LLaMA-Factory 0.9.5's, as fixtures/make_llamafactory_reference.py recorded them."""

from __future__ import annotations

import datetime
import functools
import gzip
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflex.config import RunConfig
from dataflex.data.catalog import find_sources
from dataflex.data.conversations import Unusable, to_conversation
from dataflex.data.examples import load_split, row_encoder
from dataflex.data.records import read_records

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads(gzip.decompress((FIXTURES / "llamafactory-0.9.5.json.gz").read_bytes()))
POOL = ("history", "turns", "chat", "thoughts")
DAY = datetime.datetime.strptime(REFERENCE["date"], "%d %b %Y").date()
TEMPLATES = sorted({case["template"] for case in REFERENCE["cases"]}, key=str)


def digest(row: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).hexdigest()[:16]


def folder_of(case: dict, data_dir: Path) -> Path:
    return FIXTURES / "pool" if case["dataset"] in POOL else data_dir


def encoded_rows(case: dict, data_dir: Path, tokenizer) -> Iterator[list[list[int]] | None]:
    """What this project makes of a case's rows; None for a row it drops."""
    settings = {key: value for key, value in case.items() if key not in ("dataset", "rows", "full")}
    encode = row_encoder(RunConfig(**settings, prompt_date=DAY), tokenizer)
    (source,) = find_sources([case["dataset"]], folder_of(case, data_dir))
    for record in read_records(source)[: len(case["rows"])]:
        try:
            row = encode(to_conversation(source, record))
        except Unusable:
            yield None
        else:
            yield [row.input_ids, row.labels]


@pytest.mark.filterwarnings("ignore:the tokenizer lacks")
@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_equal_llamafactory(template: str | None, data_dir: Path, tokenizer) -> None:
    tokenizer.encode = functools.cache(tokenizer.encode)  # the combinations encode the same texts
    compared = 0
    for case in REFERENCE["cases"]:
        if case["template"] != template:
            continue
        for number, (row, expected) in enumerate(
            zip(encoded_rows(case, data_dir, tokenizer), case["rows"], strict=True)
        ):
            got = row and digest(row)
            setting = {key: value for key, value in case.items() if key not in ("rows", "full")}
            assert got == expected, (
                f"row {number} of {setting}: {row} instead of {case.get('full', {}).get(str(number))}"
            )
            compared += 1
    assert compared >= 100


def test_the_reference_covers_what_it_should() -> None:
    settings = {
        (case["template"], case["dataset"], case["cutoff_len"], case["mask_history"], case["train_on_prompt"])
        for case in REFERENCE["cases"]
        if len(case["rows"]) == 40 and None not in case["rows"]
    }
    assert len(settings) == 3 * 4 * 3 * 2 * 2
    thoughts = [case for case in REFERENCE["cases"] if (case["template"], case["dataset"]) == ("qwen3", "thoughts")]
    assert len(thoughts) == 2 * 2 * 2 * 3 * 2
    assert None not in thoughts[0]["rows"]
    whole = [
        case for case in thoughts if case["cutoff_len"] == 2048 and case["mask_history"] and not case["train_on_prompt"]
    ]
    assert len({tuple(case["rows"]) for case in whole}) == 3 * 2


def test_a_shift_of_the_mask_by_one_token_would_show(data_dir: Path, tokenizer) -> None:
    case = next(case for case in REFERENCE["cases"] if case["template"] == "smollm2" and "full" in case)
    ids, labels = case["full"]["0"]
    assert digest([ids, labels]) == case["rows"][0]
    first = next(place for place, label in enumerate(labels) if label != -100)
    for place, label in ((first, -100), (first - 1, ids[first - 1])):
        shifted = [*labels[:place], label, *labels[place + 1 :]]
        assert digest([ids, shifted]) != case["rows"][0]


def test_load_split_gives_these_rows(data_dir: Path, tokenizer) -> None:
    case = next(
        case
        for case in REFERENCE["cases"]
        if (case["template"], case["dataset"], case["cutoff_len"]) == ("llama3", "alpaca_en_demo", 256)
        and not case["mask_history"]
        and not case["train_on_prompt"]
    )
    config = RunConfig(
        dataset="alpaca_en_demo", dataset_dir=str(data_dir), template="llama3", cutoff_len=256, max_samples=40
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = load_split(config, tokenizer)
    assert [digest([example.input_ids, example.labels]) for example in split.examples] == case["rows"]
    assert [str(warning.message).split(",")[0] for warning in caught] == ["the tokenizer lacks <|eot_id|>"]
