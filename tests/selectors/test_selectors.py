"""Each selector against the slow, plain way to its scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex import dynamic, load_config, load_examples
from dataflex.errors import UsageError
from dataflex.selectors.bm25 import bm25, words
from dataflex.selectors.combined import combine
from dataflex.selectors.loss import band_scores


@pytest.fixture(scope="module")
def options(tiny_model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    rows = json.loads((data_dir / "glaive_toolcall_en_demo.json").read_text())[-4:]
    target = tmp_path_factory.mktemp("target") / "target.jsonl"
    target.write_text("".join(json.dumps({**row, "subtask": "xy"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    return {
        "model_name_or_path": str(tiny_model_dir),
        "dataset": "identity,glaive_toolcall_en_demo",
        "eval_dataset": str(target),
        "dataset_dir": str(data_dir),
        "template": "qwen",
        "cutoff_len": 96,
        "max_samples": 10,
        "lora_rank": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "num_train_epochs": 1.0,
        "warmup_step": 2,
        "update_step": 1,
        "update_times": 2,
        "save_steps": 1,
        "token_budget": 300,
        "proj_dim": None,
    }


def selections(options: dict, folder: Path, **changes: object) -> list[tuple[list[int], list[float]]]:
    """The rows and scores of each selection that a run makes: 4 rows after 2 and after 3 steps."""
    dynamic(load_config(options={**options, **changes, "output_dir": str(folder)}))
    files = [folder / "selections" / f"step-{step}.jsonl" for step in (2, 3)]
    read = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [([line["row"] for line in lines], [line["score"] for line in lines]) for lines in read]


def assert_best(found: tuple[list[int], list[float]], rows: np.ndarray, wanted: np.ndarray, atol: float) -> None:
    order = np.argsort(-wanted, kind="stable")[: len(found[0])]
    np.testing.assert_allclose(found[1], wanted[order], atol=atol)
    assert found[0] == rows[order].tolist()


def by_subtask(config, cosines: np.ndarray) -> np.ndarray:
    """[V, N] to [N]: the mean over each subtask's rows, then the largest."""
    subtasks = np.array([example.subtask for example in load_examples(config, "eval")])
    return np.array([cosines[subtasks == name].mean(axis=0) for name in "xy"]).max(axis=0)


def test_rds_is_what_plain_transformers_gives_each_row_alone(options, tmp_path):
    config = load_config(options=options)
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=torch.float32).eval()

    def vector(example) -> np.ndarray:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states[-1][0]
        weights = np.arange(1, len(hidden) + 1)
        return (hidden.double().numpy() * weights[:, None]).sum(axis=0) / weights.sum()

    train, validation = (np.array([vector(row) for row in load_examples(config, split)]) for split in ("train", "eval"))
    mean = train.mean(axis=0)
    units = [(part - mean) / np.linalg.norm(part - mean, axis=1, keepdims=True) for part in (train, validation)]
    wanted = by_subtask(config, units[1] @ units[0].T)
    rows = np.array([example.row for example in load_examples(config)])
    for found in selections(options, tmp_path / "out", component_name="rds"):  # the adapter takes no part
        assert_best(found, rows, wanted, atol=1e-4)


def test_what_does_not_change_in_a_run_is_made_once(options, tmp_path):
    folder = tmp_path / "out"
    selections(options, folder, component_name="rds")
    [kept] = (folder / "selections").glob("rds-*.safetensors")
    assert kept.stat().st_mtime_ns <= (folder / "selections" / "step-2.jsonl").stat().st_mtime_ns


def test_bm25_is_lucenes_formula():
    random = np.random.default_rng(0)
    documents = [random.choice(list("abcdefgh"), size=random.integers(1, 20)).tolist() for _ in range(30)]
    queries = [["a", "b", "b"], ["h"], ["zzz"], []]
    mean = np.mean([len(document) for document in documents])

    def score(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            frequency = document.count(word)
            total += idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    for query, found in zip(queries, bm25(documents, queries), strict=True):
        np.testing.assert_allclose(found, [score(query, document) for document in documents], atol=1e-5)


def test_words_are_letters_and_digits_and_single_han_characters():
    assert words("It's 3.5 m, naïve_Käse; 你好 world한국") == [
        "it", "s", "3", "5", "m", "naïve", "käse", "你", "好", "world", "한", "국",
    ]  # fmt: skip


def test_bm25_selects_by_text(options, tmp_path):
    config = load_config(options=options)
    tokenizer = AutoTokenizer.from_pretrained(options["model_name_or_path"])
    texts = [
        [words(tokenizer.decode(row.input_ids, skip_special_tokens=True)) for row in load_examples(config, split)]
        for split in ("train", "eval")
    ]
    wanted = by_subtask(config, np.array(list(bm25(*texts)), dtype=np.float64))
    rows = np.array([example.row for example in load_examples(config)])
    for found in selections(options, tmp_path / "out", component_name="bm25"):
        assert_best(found, rows, wanted, atol=1e-4)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A random sentence-embedding model: a tiny BERT whose vectors are the mean over tokens."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    word = models.Transformer(str(folder / "bert"), max_seq_length=64)
    SentenceTransformer(modules=[word, models.Pooling(32)], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def test_embed_is_the_cosine_of_the_models_own_embeddings(options, embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    config = load_config(options=options)
    tokenizer = AutoTokenizer.from_pretrained(options["model_name_or_path"])
    model = SentenceTransformer(str(embedder), device="cpu")

    def vectors(split: str) -> np.ndarray:
        rows = load_examples(config, split)
        found = [model.encode(tokenizer.decode(row.input_ids, skip_special_tokens=True)) for row in rows]
        return np.array([vector / np.linalg.norm(vector) for vector in found], dtype=np.float64)

    wanted = by_subtask(config, vectors("eval") @ vectors("train").T)
    rows = np.array([example.row for example in load_examples(config)])
    for found in selections(options, tmp_path / "out", component_name="embed", embed_model=str(embedder)):
        assert_best(found, rows, wanted, atol=1e-5)


@pytest.mark.parametrize(("model", "words"), [(None, "needs embed_model"), ("nowhere", "cannot load nowhere")])
def test_embed_without_a_model_says_so(options, tmp_path, model, words):
    with pytest.raises(UsageError, match=words):
        selections(options, tmp_path / "out", component_name="embed", embed_model=model)


def test_loss_is_the_rows_mean_cross_entropy(options, tmp_path):
    config = load_config(options={**options, "output_dir": str(tmp_path / "out"), "component_name": "loss"})
    from dataflex.model import load_adapter, load_base_model

    found = selections(options, tmp_path / "out", component_name="loss")
    rows = np.array([example.row for example in load_examples(config)])
    for step, selection in zip((2, 3), found, strict=True):
        model = load_adapter(load_base_model(config, torch.float32), tmp_path / f"out/checkpoint-{step}", config).eval()
        with torch.no_grad():
            wanted = [
                model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
                for row in load_examples(config)
            ]
        assert_best(selection, rows, np.array(wanted), atol=1e-4)


def test_bands_of_loss():
    losses = np.array([3.0, 1.0, 2.0, 10.0])
    best_first = {
        band: np.argsort(-band_scores(losses, band), kind="stable").tolist() for band in ("high", "medium", "low")
    }
    assert best_first == {"high": [3, 0, 2, 1], "medium": [0, 2, 1, 3], "low": [1, 2, 0, 3]}


def test_length_counts_supervised_tokens(options, tmp_path):
    config = load_config(options=options)
    rows = np.array([example.row for example in load_examples(config)])
    wanted = np.array([sum(label != -100 for label in row.labels[1:]) for row in load_examples(config)])
    for found in selections(options, tmp_path / "out", component_name="length"):
        assert_best(found, rows, wanted.astype(float), atol=0)


def test_a_combination_is_the_mean_of_z_scores(options, tmp_path):
    random = np.random.default_rng(0)
    first, second = random.normal(size=20), random.normal(size=20) * 50 + 3
    wanted = ((first - first.mean()) / first.std() + (second - second.mean()) / second.std()) / 2
    np.testing.assert_allclose(combine([first, second]), wanted)
    assert np.isnan(combine([np.array([1.0, np.nan, 2.0]), np.arange(3.0)])).tolist() == [False, True, False]
    np.testing.assert_allclose(combine([first, np.ones(20)]), (first - first.mean()) / first.std() / 2)

    config = load_config(options=options)
    length = np.array([sum(label != -100 for label in row.labels[1:]) for row in load_examples(config)])
    less = {}
    for count, name in ((20, "less"), (4, "less+length")):  # 20 rows are all there are: every row's score
        folder = tmp_path / name
        changes = {
            "per_device_train_batch_size": 4,
            "component_name": name,
            "update_times": 1,
            "lr_scheduler_type": "constant",
        }
        if count == 20:
            changes |= {"update_step": 5}
        dynamic(load_config(options={**options, **changes, "output_dir": str(folder)}))
        lines = [json.loads(line) for line in (folder / "selections/step-2.jsonl").read_text().splitlines()]
        less[name] = {line["row"]: line["score"] for line in lines}
    rows = [example.row for example in load_examples(config)]
    wanted = combine([np.array([less["less"][row] for row in rows]), length])
    found = less["less+length"]
    assert_best((list(found), list(found.values())), np.array(rows), wanted, atol=1e-4)


def test_a_combination_of_what_is_not_there_is_refused():
    for name, message in (
        ("less+rdss", "did you mean 'rds'"),
        ("rds+rds", "one selector twice"),
        ("less+", "no selector ''"),
    ):
        with pytest.raises(UsageError, match=message):
            load_config(options={"component_name": name})
