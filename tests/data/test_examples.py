from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import pytest

from dataflex.config import RunConfig
from dataflex.data.examples import load_split
from dataflex.data.rows import (
    dataset_columns,
    largest_tokens,
    lengths_of,
    row_numbers,
    subtasks_of,
    supervised_tokens,
)
from dataflex.errors import UsageError
from dataflex.progress import SilentTask


def row(instruction: str = "a", output: object = "b", **more: object) -> dict[str, object]:
    return {"instruction": instruction, "input": "", "output": output, **more}


NOT_A_TEXT = "malformed record (output is int, not a text; write it as one)"


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
    assert (split.report.seen, split.report.kept, split.report.dropped) == (6, 4, {"no response": [1], NOT_A_TEXT: [5]})


def test_subtask_is_the_records_own(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("one", [row(subtask="x"), row(), row(subtask=None)])
    assert [e.subtask for e in load_split(config(tmp_path, dataset="one"), tokenizer).examples] == ["x", None, None]
    write_dataset("two", [row(subtask="y")])
    split = load_split(config(tmp_path, eval_dataset=["one", "two"]), tokenizer, "eval")
    assert [e.subtask for e in split.examples] == ["x", "one", "one", "y"]


def test_a_subtask_may_be_any_scalar_and_nothing_else(tmp_path: Path, write_dataset, tokenizer) -> None:
    scalars = ["x", 3, 1.5, True, "", "two words"]
    write_dataset("one", [row(subtask=scalar) for scalar in scalars])
    examples = load_split(config(tmp_path, dataset="one"), tokenizer).examples
    assert [example.subtask for example in examples] == ["x", "3", "1.5", "true", "", "two words"]
    for bad, kind in (([1], "list"), ({"a": 1}, "dict")):
        write_dataset("two", [row(), row(subtask=bad)])
        with pytest.raises(UsageError, match=f"dataset two, row 1: subtask is of type {kind}; give it a text"):
            load_split(config(tmp_path, dataset="two"), tokenizer)


def test_max_samples_that_cuts_the_validation_set_is_said(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("v", [row(str(number)) for number in range(10)])
    for _ in range(2):  # also where the rows come from the cache
        with pytest.warns(UserWarning, match="eval data: max_samples takes 6 of 10 rows of 'v'; raise it"):
            load_split(config(tmp_path, eval_dataset="v", max_samples=6), tokenizer, "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_split(config(tmp_path, eval_dataset="v", max_samples=10), tokenizer, "eval")
        load_split(config(tmp_path, dataset="v", max_samples=6), tokenizer)


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
    with pytest.raises(UsageError, match=r"row 0: no supervised token .the chat template writes none for the response"):
        load_split(config(tmp_path, dataset="empty", template="empty"), tokenizer)


def test_no_row_left_lists_the_reasons(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("bad", [row(output=None), row(instruction=[1]), row(output=None)])
    with pytest.raises(UsageError) as error:
        load_split(config(tmp_path, dataset="bad"), tokenizer)
    assert str(error.value).splitlines() == [
        "dataset bad: none of 3 rows can be used",
        "  row 0: no response (2 rows so)",
        "  row 1: malformed record (instruction is list, not a text; write it as one) (1 rows so)",
    ]


def test_a_column_that_naming_others_unset_is_said(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("bad", [row()], columns={"prompt": "instruction", "query": "input"})
    with pytest.raises(UsageError, match=r"row 0: no response \(columns leave out response: naming some unsets"):
        load_split(config(tmp_path, dataset="bad"), tokenizer)
    records = [{**row(), "input": text} for text in ("", "It is read.", "So it is.")]
    write_dataset("half", records, columns={"prompt": "instruction", "response": "output"})
    for _ in range(2):  # also where the rows come from the cache
        with pytest.warns(UserWarning, match=r"not read: column 'input', in 2 of 3 rows .first: row 1.; .* unsets"):
            load_split(config(tmp_path, dataset="half"), tokenizer)


def test_a_tag_that_naming_others_unset_is_said(tmp_path: Path, write_dataset, tokenizer) -> None:
    turns = [{"from": name, "value": "x"} for name in ("human", "function_call", "observation", "gpt")]
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    records = [{"conversations": turns}, {"conversations": [turns[0], turns[3]]}]
    write_dataset("t", records, formatting="sharegpt", tags=tags)
    report = load_split(config(tmp_path, dataset="t"), tokenizer).report
    assert report.dropped == {
        "turn 2 (function_call): roles do not alternate ('function_call' has no tag: naming some unsets the others)": [
            0
        ],
    }


@pytest.mark.parametrize(("split", "rows"), [("train[:3]", [0, 1, 2]), ("train[80%:]", [8, 9]), ("train[-1:]", [9])])
def test_a_slice_of_a_file_keeps_its_row_numbers(
    tmp_path: Path, write_dataset, tokenizer, split: str, rows: list[int]
) -> None:
    write_dataset("many", [row(str(number)) for number in range(10)], split=split)
    assert [e.row for e in load_split(config(tmp_path, dataset="many"), tokenizer).examples] == rows
    write_dataset("many", [row()], split="test")
    with pytest.raises(UsageError, match="split 'test' is not of its file"):
        load_split(config(tmp_path, dataset="many"), tokenizer)


@pytest.mark.parametrize(("val_size", "held"), [(0.25, 5), (7, 7), (1, 1)])
def test_held_out_rows_are_those_of_train_test_split(
    tmp_path: Path, write_dataset, tokenizer, val_size: float, held: int
) -> None:
    import datasets

    write_dataset("first", [row(str(number)) for number in range(12)])
    write_dataset("second", [row(str(number)) for number in range(8)])
    settings = config(tmp_path, dataset="first,second", val_size=val_size, seed=3)
    train, validation = (load_split(settings, tokenizer, split) for split in ("train", "eval"))
    expected = datasets.Dataset.from_dict({"row": range(20)}).train_test_split(test_size=held, seed=3)
    assert [e.row for e in train.examples] == sorted(expected["train"]["row"])
    assert [e.row for e in validation.examples] == sorted(expected["test"]["row"])
    assert len(validation.examples) == held
    other_draw = load_split(settings.changed(seed=4), tokenizer, "eval")
    assert len({train.fingerprint, validation.fingerprint, other_draw.fingerprint}) == 3


def test_val_size_that_leaves_nothing(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset("few", [row(), row()])
    with pytest.raises(UsageError, match="val_size is 2"):
        load_split(config(tmp_path, dataset="few", val_size=2), tokenizer, "eval")
    with pytest.raises(ValueError, match="exclude each other"):
        config(tmp_path, dataset="few", eval_dataset="few", val_size=1)


def test_malformed_tools_drop_their_row(tmp_path: Path, write_dataset, tokenizer) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [{"conversations": turns, "tools": tools} for tools in ("[]", "not json", "")]
    write_dataset("t", records, formatting="sharegpt", columns={"messages": "conversations", "tools": "tools"})
    report = load_split(config(tmp_path, dataset="t"), tokenizer).report
    assert report.dropped == {"malformed tools (not JSON); write it as JSON": [1]}


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

    class Recorder(SilentTask):
        @contextlib.contextmanager
        def task(self, description: str, total: int, unit: str, *expected: object):
            told.append((description, total, unit))
            yield self

        def advance(self, amount: int = 1, **shown: object) -> None:
            told.append(amount)

        def say(self, message: str) -> None:
            told.append(message)

    before = load_split(config(tmp_path, dataset="a"), tokenizer, progress=Recorder()).fingerprint
    assert told == [("tokenizing", 2, "rows"), 2, "train data: 1 of 2 rows; 1 dropped, no response (first: row 1)"]
    write_dataset("a", [row(), row(output="c")])
    assert load_split(config(tmp_path, dataset="a"), tokenizer).fingerprint != before


def test_columns_are_what_the_examples_say(tmp_path: Path, write_dataset, tokenizer) -> None:
    write_dataset(
        "some", [row(output="yes"), {"instruction": 3}, {**row(output="a longer one"), "subtask": "s"}, {"output": ""}]
    )
    write_dataset("more", [{"instruction": 1}, row(output="no no")])
    mapped = load_split(config(tmp_path, dataset="some,more"), tokenizer).examples
    rows = list(mapped)
    assert [example.row for example in rows] == [0, 2, 3, 5]
    for function in (lengths_of, supervised_tokens, row_numbers, largest_tokens, subtasks_of):
        assert list(function(mapped)) == list(function(rows)), function.__name__
    for examples in (mapped, rows):
        names, source = dataset_columns(examples)
        assert [names[index] for index in source] == [example.dataset for example in rows]
