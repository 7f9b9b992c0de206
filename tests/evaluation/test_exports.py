"""What `eval --export` gives to DataFlow and to lm-eval, and what comes back."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import dataflex
from dataflex.data.conversations import Conversation, Message
from dataflex.errors import UsageError
from dataflex.evaluation import lm_eval
from dataflex.evaluation.dataflow import question_and_answer

Options = dict[str, Any]


@pytest.fixture
def options(model_dir: Path, data_dir: Path, tmp_path: Path) -> Options:
    return {
        "model_name_or_path": str(model_dir), "held_out": "identity", "dataset_dir": str(data_dir), "cutoff_len": 96,
        "template": "smollm2", "max_samples": 3, "max_new_tokens": 0, "output": str(tmp_path / "eval.json"),
    }  # fmt: skip


def test_dataflow_finds_every_row_and_the_model(options: Options, data_dir: Path, model_dir: Path) -> None:
    path = dataflex.evaluate(dataflex.load_config(options={**options, "export": "dataflow"}))
    folder = path.with_name("eval-dataflow")
    records = json.loads((data_dir / "identity.json").read_text(encoding="utf-8"))[:3]
    questions = [{"input": record["instruction"], "output": record["output"]} for record in records]
    assert json.loads((folder / "qa.json").read_text(encoding="utf-8")) == questions

    spec = importlib.util.spec_from_file_location("config", folder / "eval_local.py")  # as DataFlow loads it
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_evaluator_config()
    assert [model["path"] for model in config["TARGET_MODELS"]] == [str(model_dir.resolve())]
    (bench,) = config["BENCH_CONFIG"]
    assert Path(bench["input_file"]) == folder.resolve() / "qa.json"
    assert all(bench[key] in question for key in ("question_key", "reference_answer_key") for question in questions)
    assert config["create_judge_serving"]() is None and config["EVAL_CONFIG"] == {"compare_method": "match"}
    assert {"EVALUATOR_RUN_CONFIG", "create_evaluator", "create_storage"} <= config.keys()


def test_what_stands_before_an_answer_is_one_text() -> None:
    turns = [
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
        Message("user", "And 3 more?"),
        Message("assistant", "7"),
    ]
    assert question_and_answer(Conversation(turns[:2])) == {"input": "2 + 2?", "output": "4"}
    assert question_and_answer(Conversation(turns, system="Count.")) == {
        "input": "system: Count.\n\nuser: 2 + 2?\n\nassistant: 4\n\nuser: And 3 more?",
        "output": "7",
    }


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task whose one question asks which of two answers the model finds likelier."""
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"question": "The sky is", "right": " blue", "wrong": " qqqq zzzz"}) + "\n", encoding="utf-8"
    )
    path = tmp_path / "sky.yaml"
    path.write_text(
        f"""
        task: sky
        dataset_path: json
        dataset_kwargs: {{data_files: {tmp_path / "questions.jsonl"}}}
        test_split: train
        output_type: loglikelihood
        doc_to_text: "{{{{question}}}}"
        doc_to_target: "{{{{right}}}}"
        metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
        """,
        encoding="utf-8",
    )
    return path


def test_results_of_lm_eval_stand_beside_ours(options: Options, task: Path, model_dir: Path) -> None:
    """Its perplexity of an answer equals that of a plain forward pass."""
    import torch

    config = dataflex.load_config(options={**options, "export": "lm-eval", "tasks": [str(task)]})
    found = json.loads(dataflex.evaluate(config).read_text(encoding="utf-8"))
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    asked, whole = (tokenizer(text, return_tensors="pt").input_ids for text in ("The sky is", "The sky is blue"))
    with torch.no_grad():
        told = model(whole).logits[0].double().log_softmax(-1)
    start = asked.shape[1]
    nll = -sum(float(told[at - 1, whole[0, at]]) for at in range(start, whole.shape[1]))
    assert found["lm_eval"]["tasks"]["sky"]["perplexity,none"] == pytest.approx(
        float(torch.tensor(nll).exp()), rel=1e-3
    )
    assert found["rows"] == 3
    assert lm_eval.metrics_of(found["lm_eval"]["tasks"])[0][:2] == ("sky", "perplexity")


def test_without_lm_eval_its_command_is_told(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    options |= {"export": "lm-eval", "tasks": "gsm8k,mmlu", "adapter_name_or_path": ["saves/less"], "bf16": True}
    config = dataflex.load_config(options=options)
    told = lm_eval.run_tasks(config)
    assert told["tasks"] is None
    arguments = shlex.split(told["command"])
    model = options["model_name_or_path"]
    assert arguments[:5] == [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=bfloat16,peft=saves/less",
    ]
    assert arguments[5:7] == ["--tasks", "gsm8k,mmlu"]


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"export": "lm-eval"}, "needs tasks"),
        ({"export": "lm-eval", "tasks": "a", "model_name_or_path": "m.gguf"}, "no .gguf"),
        ({"export": "lm-eval", "tasks": "a", "adapter_name_or_path": ["a", "b"]}, "merge them first"),
    ],
)
def test_what_lm_eval_cannot_load_is_refused(options: Options, further: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lm_eval.check_tasks(dataflex.load_config(options={**options, **further}))


def test_dataflow_takes_no_adapter(options: Options) -> None:
    config = dataflex.load_config(options={**options, "export": "dataflow", "adapter_name_or_path": ["saves/less"]})
    with pytest.raises(UsageError, match="merge the adapter"):
        dataflex.evaluate(config)


def test_a_task_that_fails_leaves_what_was_measured(options: Options, tmp_path: Path) -> None:
    """And the same command goes on from it."""
    command = [sys.executable, "-m", "dataflex", "eval", *(f"{key}={value}" for key, value in options.items())]
    command += ["--export", "lm-eval", "--tasks", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "lm-eval ended with exit code" in done.stderr.splitlines()[-1]
    assert (tmp_path / "eval.json.partial").exists() and not (tmp_path / "eval.json").exists()
    again = subprocess.run(command[:-4], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["rows"] == 3
