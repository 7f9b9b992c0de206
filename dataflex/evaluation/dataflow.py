"""Held-out rows and a configuration for DataFlow's own evaluation, which a user starts with `dataflow eval local`.

As open-dataflow 1.0.13 has it, `dataflow eval local` imports eval_local.py of the working directory, lets vLLM answer
each question, and matches the answers, or has a judge model compare them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dataflex.config import RunConfig, needed
from dataflex.data.catalog import find_sources
from dataflex.data.conversations import Conversation, to_conversation
from dataflex.data.examples import split_names
from dataflex.data.subset import take_records
from dataflex.errors import UsageError
from dataflex.files import check_output_file, write_json, write_text
from dataflex.progress import SILENT, Progress

CONFIGURATION = '''\
"""Evaluation of {model} on {rows} questions: run `dataflow eval local` in this folder."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
JUDGE_MODEL = None  # a folder or hub id: this model judges the answers; without it mathematical answers are matched

TARGET_MODELS = [
    {{
        "name": {name},
        "path": {path},
        "answer_prompt": "",  # stands before each question
        "vllm_temperature": 0.0,
        "vllm_max_tokens": {max_tokens},
        "vllm_tensor_parallel_size": 1,
        "cache_dir": str(HERE / "cache"),
    }},
]
BENCH_CONFIG = [
    {{
        "name": "held_out",
        "input_file": str(HERE / "qa.json"),
        "question_key": "input",
        "reference_answer_key": "output",
        "output_dir": str(HERE / "results"),
        "eval_output_dir": str(HERE / "results"),
    }},
]
EVALUATOR_RUN_CONFIG = {{
    "input_test_answer_key": "model_generated_answer",
    "input_gt_answer_key": "output",
    "input_question_key": "input",
}}
EVAL_CONFIG = {{"compare_method": "semantic" if JUDGE_MODEL else "match"}}


def create_judge_serving():
    if JUDGE_MODEL is None:
        return None
    from dataflow.serving import LocalModelLLMServing_vllm

    return LocalModelLLMServing_vllm(hf_model_name_or_path=JUDGE_MODEL)


def create_evaluator(judge_serving, eval_result_path):
    from dataflow.operators.core_text import BenchDatasetEvaluatorQuestion

    return BenchDatasetEvaluatorQuestion(
        compare_method=EVAL_CONFIG["compare_method"],
        llm_serving=judge_serving,
        prompt_template=None,
        eval_result_path=eval_result_path,
    )


def create_storage(data_file, cache_path, bench_name="held_out"):
    from dataflow.utils.storage import FileStorage

    return FileStorage(
        first_entry_file_name=data_file, cache_path=cache_path, file_name_prefix=bench_name, cache_type="json"
    )


def get_evaluator_config():
    names = (
        "TARGET_MODELS", "BENCH_CONFIG", "EVALUATOR_RUN_CONFIG", "EVAL_CONFIG", "create_judge_serving",
        "create_evaluator", "create_storage",
    )  # fmt: skip
    return {{name: globals()[name] for name in names}}
'''


def export_paths(config: RunConfig) -> tuple[Path, Path]:
    """The questions and the configuration: in a folder beside `output`, since DataFlow looks for this file name."""
    output = Path(needed(config.output))
    folder = output.with_name(f"{output.stem}-dataflow")
    return folder / "qa.json", folder / "eval_local.py"


def check_export(config: RunConfig) -> None:
    """Raise a UsageError where the export cannot be written, or the model is not one that DataFlow loads."""
    if config.adapter_name_or_path:
        raise UsageError(
            "export dataflow: DataFlow loads whole models; merge the adapter (`dataflex merge`), and name the merged "
            "folder as model_name_or_path"
        )
    for path in export_paths(config):
        check_output_file(path, overwrite=True)  # it goes with `output`, which is looked at by itself


def export_rows(config: RunConfig, rows: Sequence[int], progress: Progress = SILENT) -> list[Path]:
    """Write the validation rows with the numbers `rows` as DataFlow takes them; return the paths."""
    sources = find_sources(split_names(config, "eval"), config.dataset_dir)
    taken, _ = take_records(sources, rows, expected=len(rows), progress=progress)
    questions = [question_and_answer(to_conversation(*taken[row])) for row in rows]
    qa, configuration = export_paths(config)
    name = needed(config.model_name_or_path)
    local = Path(name)
    text = CONFIGURATION.format(
        model=local.name.replace('"', ""),
        rows=len(questions),
        name=json.dumps(local.name),
        path=json.dumps(str(local.resolve()) if local.exists() else name),
        max_tokens=config.max_new_tokens or RunConfig().max_new_tokens,
    )
    write_json(qa, questions)
    write_text(configuration, text)
    return [qa, configuration]


def question_and_answer(conversation: Conversation) -> dict[str, str]:
    """The last answer of a conversation, and all that stands before it as one text.

    A question alone is its own text. Tools, a system text and earlier turns stand before it, each under its role.
    """
    *before, answer = conversation.messages
    parts = [("tools", conversation.tools), ("system", conversation.system)]
    parts = [part for part in parts if part[1]] + [(message.role, message.content) for message in before]
    alone = len(parts) == 1
    question = parts[0][1] if alone else "\n\n".join(f"{role}: {text}" for role, text in parts)
    return {"input": question, "output": answer.content}
