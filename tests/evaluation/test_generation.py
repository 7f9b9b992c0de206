"""Greedy answers against `model.generate` on single prompts, and which answers match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dataflex
from dataflex.data.rows import Example
from dataflex.errors import UsageError
from dataflex.evaluation.generation import answer_start, prompt_of, until_stop
from dataflex.evaluation.matching import exact, mathematical, normalised


def test_answers_are_those_of_generate_on_single_prompts(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {
        "model_name_or_path": str(model_dir), "held_out": "identity", "dataset_dir": str(data_dir), "cutoff_len": 96,
        "template": "smollm2", "max_samples": 4, "max_new_tokens": 8, "token_budget": 400,
        "output": str(tmp_path / "eval.json"), "rows": str(tmp_path / "rows.jsonl"),
    }  # fmt: skip
    config = dataflex.load_config(options=options)
    dataflex.evaluate(config)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = dataflex.load_examples(config.changed(eval_dataset=["identity"]), "eval")
    for row, example in zip(rows, examples, strict=True):
        prompt = torch.tensor([prompt_of(example).input_ids])
        tokens = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8
        )
        assert row["generated"] == tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["generated"] and row["answer"] and "user" in row["prompt"]
        assert row["exact"] == (row["answer"].strip() == row["generated"].strip())


def row(labels: list[int]) -> Example:
    return Example(3, list(range(10, 10 + len(labels))), labels, None, "data")


def test_the_prompt_ends_where_the_last_answer_begins() -> None:
    assert prompt_of(row([-100, 11, -100, -100, 14, 15])).input_ids == [10, 11, 12, 13]
    assert answer_start(row([-100, 11, -100])) == 1
    with pytest.raises(UsageError, match="row 3 of data: no prompt"):
        answer_start(row([10, 11]))


def test_an_answer_ends_before_its_stop_token() -> None:
    assert until_stop([5, 6, 2, 7], [2, 9]) == [5, 6]
    assert until_stop([5, 6], [2]) == [5, 6]


@pytest.mark.parametrize(
    ("answer", "generated", "matches"),
    [
        ("Paris", " Paris\n", (True, True)),
        ("Paris.", "paris", (False, True)),
        ("a  b", "a b", (False, True)),
        ("１２", "12", (False, True)),
        ("你好。", "你好", (False, True)),
        ("well-known", "well known", (False, True)),
        ("Paris", "London", (False, False)),
        ("12", "1 2", (False, False)),
    ],
)
def test_matches(answer: str, generated: str, matches: tuple[bool, bool]) -> None:
    assert (exact(answer, generated), normalised(answer, generated)) == matches


@pytest.mark.parametrize(
    ("answer", "generated", "matches"),
    [
        ("23 + 8 = 31. Mei has 62 shells.", "So she has 62 of them.", True),
        ("23 + 8 = 31. Mei has 62 shells.", "So she has 63 of them.", False),
        (r"$\frac{1}{2}$", "The answer is 0.5.", True),
        ("1,234", "1234", True),
        ("62", "no idea", False),
        ("hello", "hello", None),
    ],
)
def test_the_same_number_or_expression_matches(answer: str, generated: str, matches: bool | None) -> None:
    assert mathematical(answer, generated) is matches
