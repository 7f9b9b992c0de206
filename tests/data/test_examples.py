from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from dataflex.config import RunConfig
from dataflex.data.examples import load_split
from dataflex.errors import UsageError


def row(instruction: str = "a", output: object = "b", **more: object) -> dict[str, object]:
    return {"instruction": instruction, "input": "", "output": output, **more}


def config(folder: Path, **values: object) -> RunConfig:
    return RunConfig(**{"dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 128, **values})


def test_row_numbers_count_through_the_data_before_any_row_is_dropped(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("first", [row(), row(output=None), row(), row(), row()])
    write_dataset("second", [row(output=3), row(), row()])
    split = load_split(config(tmp_path, dataset="first,second", max_samples=3), tokenizer)
    assert [(example.row, example.dataset, example.subtask) for example in split.examples] == [
        (0, "first", "first"),
        (2, "first", "first"),
        (6, "second", "second"),
        (7, "second", "second"),
    ]
    assert (split.report.seen, split.report.kept, split.report.dropped) == (6, 4, {"no response": [1, 5]})


def test_subtask_is_the_records_own(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("one", [row(subtask="x"), row(), row(subtask=3)])
    assert [e.subtask for e in load_split(config(tmp_path, dataset="one"), tokenizer).examples] == ["x", None, None]
    write_dataset("two", [row(subtask="y")])
    split = load_split(config(tmp_path, eval_dataset=["one", "two"]), tokenizer, "eval")
    assert [e.subtask for e in split.examples] == ["x", "one", "one", "y"]


def test_num_samples_are_drawn_by_the_seed_and_keep_their_row_numbers(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("many", [row(str(number)) for number in range(50)], num_samples=20)
    picks = [
        [e.row for e in load_split(config(tmp_path, dataset="many", seed=seed), tokenizer).examples]
        for seed in (1, 1, 2)
    ]
    assert picks[0] == picks[1] == sorted(set(picks[0]))
    assert len(picks[0]) == 20 and picks[0] != picks[2]
    fewer = load_split(config(tmp_path, dataset="many", seed=1, max_samples=5), tokenizer)
    assert len(fewer.examples) == 5 and {e.row for e in fewer.examples} < set(picks[0])
    write_dataset("few", [row()], num_samples=2)
    with pytest.raises(UsageError, match="num_samples is 2, but it has 1 rows"):
        load_split(config(tmp_path, dataset="few"), tokenizer)


def test_report_of_truncation_and_lengths(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("long", [row("word " * 300, "short"), row("short", "word " * 300), row()])
    split = load_split(config(tmp_path, dataset="long", cutoff_len=64), tokenizer)
    report = split.report
    assert (report.truncated, report.lost_end) == (2, 1)
    assert report.lengths == [len(example.input_ids) for example in split.examples]
    assert report.length_quantile(1.0) == 64
    assert report.length_quantile(0.0) == min(report.lengths)
    assert report.supervised_tokens == sum(label != -100 for e in split.examples for label in e.labels)


def test_an_empty_response_is_kept_for_its_end_token(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("empty", [row(output="")])
    (example,) = load_split(config(tmp_path, dataset="empty"), tokenizer).examples
    assert [label for label in example.labels if label != -100] == tokenizer.encode("<|im_end|>\n")
    with pytest.raises(UsageError, match="row 0: no supervised token within cutoff_len"):
        load_split(config(tmp_path, dataset="empty", template="empty"), tokenizer)


def test_no_row_left_lists_the_reasons(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("bad", [row(output=None), row(instruction=[1]), row(output=None)])
    with pytest.raises(UsageError) as error:
        load_split(config(tmp_path, dataset="bad"), tokenizer)
    assert str(error.value).splitlines() == [
        "dataset bad: none of 3 rows can be used",
        "  row 0: no response (2 rows so)",
        "  row 1: malformed record (instruction is list, not a text) (1 rows so)",
    ]


def test_malformed_tools_drop_their_row(tmp_path: Path, write_dataset, tokenizer) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [{"conversations": turns, "tools": tools} for tools in ("[]", "not json", "")]
    write_dataset("t", records, formatting="sharegpt", columns={"messages": "conversations", "tools": "tools"})
    report = load_split(config(tmp_path, dataset="t"), tokenizer).report
    assert report.dropped == {"malformed tools (not JSON)": [1]}


def test_what_the_config_lacks_or_forbids(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("a", [row()])
    with pytest.raises(UsageError, match="needs eval_dataset"):
        load_split(config(tmp_path, dataset="a"), tokenizer, "eval")
    with pytest.raises(UsageError, match="'falcon' cannot train_on_prompt"):
        load_split(config(tmp_path, dataset="a", template="falcon", train_on_prompt=True), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="set `template`"):
        load_split(config(tmp_path, dataset="a", template=None), tokenizer)


def test_progress_and_hash(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("a", [row(), row(output=None)])
    told = []

    class Recorder:
        @contextlib.contextmanager
        def task(self, description: str, total: int, unit: str):
            told.append((description, total, unit))
            yield self

        def advance(self, amount: int = 1, **shown: object) -> None:
            told.append(amount)

    before = load_split(config(tmp_path, dataset="a"), tokenizer, progress=Recorder()).hash
    assert told == [("tokenizing", 2, "rows"), 1, 1]
    write_dataset("a", [row(), row(output="c")])
    assert load_split(config(tmp_path, dataset="a"), tokenizer).hash != before
