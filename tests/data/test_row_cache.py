from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.config import RunConfig
from dataflex.data import examples
from dataflex.data import row_cache as cache
from dataflex.data.examples import Split, load_split
from dataflex.errors import UsageError

ROWS = [
    {"instruction": "a", "output": "word " * 200},
    {"instruction": "b", "output": None},
    {"instruction": "c", "output": 3},
    {"instruction": ["d"], "output": "x"},
    {"instruction": "e", "output": "short", "subtask": "s"},
]


@pytest.fixture
def data(write_dataset) -> Path:
    return write_dataset("rows", ROWS)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever rows are encoded."""
    calls: list[int] = []
    encode = examples.encode_records

    def counting(*arguments: object) -> object:
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(examples, "encode_records", counting)
    return calls


def config(folder: Path, **values: object) -> RunConfig:
    return RunConfig(
        **{"dataset": "rows", "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 64, **values}
    )


def contents(split: Split) -> tuple:
    return list(split.examples), split.report, split.fingerprint


def test_a_cached_result_is_the_same_and_encodes_nothing(
    tmp_path: Path, data, tokenizer, counted, row_cache: Path
) -> None:
    first = load_split(config(tmp_path), tokenizer)
    again = load_split(config(tmp_path), tokenizer)
    assert len(counted) == 1
    assert contents(first) == contents(again)
    assert (first.report.truncated, first.report.dropped) == (
        1,
        {
            "no response": [1],
            "malformed record (output is int, not a text; write it as one)": [2],
            "malformed record (instruction is list, not a text; write it as one)": [3],
        },
    )
    assert [path.suffix for path in sorted(row_cache.iterdir())] == [".arrow", ".lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "rows.json"]


def test_overwrite_cache_encodes_anew(tmp_path: Path, data, tokenizer, counted, monkeypatch) -> None:
    first = load_split(config(tmp_path), tokenizer)
    again = load_split(config(tmp_path, overwrite_cache=True), tokenizer)
    assert len(counted) == 2
    assert contents(first) == contents(again)
    for name in ("RANK", "LOCAL_RANK"):  # another process of the machine does it
        monkeypatch.setenv(name, "1")
    load_split(config(tmp_path, overwrite_cache=True), tokenizer)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 63},
        {"template": "chatml"},
        {"template": None},
        {"mask_history": True},
        {"train_on_prompt": True},
        {"max_samples": 4},
        {"enable_thinking": False},
        {"val_size": 0.25},
    ],
)
def test_what_decides_the_rows_decides_the_key(tmp_path: Path, data, tokenizer, counted, change: dict) -> None:
    load_split(config(tmp_path), tokenizer)
    load_split(config(tmp_path, **change), tokenizer)
    assert len(counted) == 2


def test_what_does_not_decide_the_rows_does_not_decide_the_key(tmp_path: Path, data, tokenizer, counted) -> None:
    first = load_split(config(tmp_path), tokenizer)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("rows.json", "dataset_info.json"):
        (other / name).write_bytes((tmp_path / name).read_bytes())
    settings = config(other, dataset=None, eval_dataset="rows", seed=7, learning_rate=1.0, preprocessing_num_workers=2)
    assert contents(load_split(settings, tokenizer, "eval")) == contents(first)
    assert len(counted) == 1


def test_the_data_and_its_layout_decide_the_key(tmp_path: Path, data, tokenizer, counted, write_dataset) -> None:
    load_split(config(tmp_path), tokenizer)
    write_dataset("rows", [*ROWS, ROWS[0]])
    assert load_split(config(tmp_path), tokenizer).report.seen == 6
    write_dataset("rows", ROWS, columns={"prompt": "instruction", "response": "subtask"})
    assert load_split(config(tmp_path), tokenizer).report.dropped["no response"] == [0, 1, 2]
    assert len(counted) == 3


def test_the_same_bytes_cut_into_other_files_are_other_data(tmp_path: Path, tokenizer) -> None:
    line = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("one", "two")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    counts = []
    for ones, twos in ((1, 2), (2, 1)):
        (tmp_path / "one.jsonl").write_text(line * ones)
        (tmp_path / "two.jsonl").write_text(line * twos)
        split = load_split(config(tmp_path, dataset="one,two"), tokenizer)
        counts.append([example.dataset for example in split.examples].count("one"))
    assert counts == [1, 2]


def test_the_tokenizer_decides_the_key(tmp_path: Path, data, tokenizer, counted) -> None:
    load_split(config(tmp_path), tokenizer)
    tokenizer.add_tokens(["word word"])
    load_split(config(tmp_path), tokenizer)
    assert len(counted) == 2


@pytest.mark.filterwarnings("ignore:the tokenizer lacks")
def test_the_date_decides_the_key_where_the_template_tells_it(tmp_path: Path, data, tokenizer, counted) -> None:
    for template in ("smollm2", "llama3"):
        for day in ("2026-01-02", "2026-01-03"):
            load_split(config(tmp_path, template=template, prompt_date=day), tokenizer)
    assert len(counted) == 1 + 2


def test_the_code_decides_the_key(tmp_path: Path, data, tokenizer, counted, monkeypatch) -> None:
    load_split(config(tmp_path), tokenizer)
    monkeypatch.setattr(cache, "_code", lambda: b"another version")
    load_split(config(tmp_path), tokenizer)
    assert len(counted) == 2


def test_a_tokenizer_that_cannot_be_written_down_is_not_cached(
    tmp_path: Path, data, tokenizer, counted, row_cache: Path
) -> None:
    class Plain:
        def __init__(self) -> None:
            self.__dict__.update(
                {
                    name: getattr(tokenizer, name)
                    for name in ("eos_token", "eos_token_id", "pad_token_id", "chat_template")
                }
            )
            self.encode, self.decode, self.add_tokens = tokenizer.encode, tokenizer.decode, tokenizer.add_tokens

        def __len__(self) -> int:
            return len(tokenizer)

    expected = contents(load_split(config(tmp_path), tokenizer))
    for _ in range(2):
        assert contents(load_split(config(tmp_path), Plain())) == expected
    assert len(counted) == 3
    assert len(list(row_cache.glob("*.arrow"))) == 1


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path, data, tokenizer, counted, row_cache, monkeypatch) -> None:
    expected = contents(load_split(config(tmp_path), tokenizer, keep=False))
    assert not row_cache.exists()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "a file is no folder"))
    assert contents(load_split(config(tmp_path), tokenizer)) == expected
    assert len(counted) == 2


def test_what_fails_leaves_nothing_behind(tmp_path: Path, tokenizer, row_cache: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\nbroken\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    for _ in range(2):
        with pytest.raises(UsageError, match="line 2: not JSON"):
            load_split(config(tmp_path), tokenizer)
    assert [path.suffix for path in row_cache.iterdir()] == [".lock"]


def test_no_row_left_is_an_error_from_the_cache_too(tmp_path: Path, write_dataset, tokenizer, counted) -> None:
    write_dataset("rows", ROWS[1:3])
    for _ in range(2):
        with pytest.raises(UsageError, match="none of 2 rows can be used\n  row 0: no response"):
            load_split(config(tmp_path), tokenizer)
    assert len(counted) == 1


def test_two_processes_at_once_encode_once(tmp_path: Path, write_dataset, model_dir: Path, row_cache: Path) -> None:
    write_dataset("rows", ROWS * 200)
    program = f"""
import sys, time
from transformers import AutoTokenizer
from dataflex.config import RunConfig
from dataflex.data import examples
encode = examples.encode_records
def telling(*arguments):
    print("encoding")
    for batch in encode(*arguments):
        time.sleep(0.1)
        yield batch
examples.encode_records = telling
config = RunConfig(dataset="rows", dataset_dir={str(tmp_path)!r}, template="smollm2", cutoff_len=64)
tokenizer = AutoTokenizer.from_pretrained({str(model_dir)!r})
print("ready", flush=True)
sys.stdin.readline()
print(sum(sum(example.input_ids) for example in examples.load_split(config, tokenizer).examples))
"""
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True, env=os.environ) for _ in "ab"
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in both]
    assert sorted(map(len, told)) == [1, 2]
    assert told[0][-1] == told[1][-1]
    assert len(list(row_cache.glob("*.arrow"))) == 1
