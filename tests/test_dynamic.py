"""`dynamic` against the same numbers worked out the slow way, and what it must leave alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dataflex import dynamic, load_config, load_examples
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.reference import reference_weights
from dataflex.influence import exact
from dataflex.model import load_adapter, load_base_model
from dataflex.selectors.bm25 import bm25, words
from dataflex.selectors.candidates import choose_candidates
from dataflex.training.moments import load_moments
from dataflex.training.schedule import dynamic_schedule


@pytest.fixture
def options(tiny_model_dir: Path, data_dir: Path, tmp_path: Path) -> dict:
    rows = json.loads((data_dir / "glaive_toolcall_en_demo.json").read_text())[-4:]
    target = tmp_path / "target.jsonl"
    target.write_text("".join(json.dumps({**row, "subtask": "xy"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    return {
        "model_name_or_path": str(tiny_model_dir),
        "dataset": "identity,alpaca_en_demo",
        "eval_dataset": str(target),
        "dataset_dir": str(data_dir),
        "template": "qwen",
        "cutoff_len": 96,
        "max_samples": 12,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "num_train_epochs": 1.0,
        "warmup_step": 3,
        "update_step": 2,
        "update_times": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "token_budget": 300,
        "proj_dim": None,
    }


def slow_cosines(config, checkpoint: Path) -> np.ndarray:
    """[subtasks, rows]: each cosine from autograd on one row and a real AdamW's step, in float64."""
    steps, _, queries = slow_directions(config, checkpoint)
    cosines, subtasks = queries @ steps.T, [example.subtask for example in load_examples(config, "eval")]
    return np.array([cosines[[subtask == name for subtask in subtasks]].mean(axis=0) for name in "xy"])


def slow_directions(config, checkpoint: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As unit rows in float64: the training rows' AdamW steps and their gradients [N, P], and the validation rows'
    gradients [V, P]; of the layers in grad_layers."""
    model = load_adapter(load_base_model(config, torch.float32), checkpoint, config).eval().double()
    names = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (config.grad_layers is None or f".layers.{config.grad_layers}." in name)
    }
    moments = load_moments(checkpoint)

    def gradient(example) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss.backward()
        return {name: p.grad.clone() for name, p in names.items()}

    def adam_step(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = []
        for name, value in gradients.items():
            theta = torch.nn.Parameter(torch.zeros_like(value))
            optimizer = torch.optim.AdamW(
                [theta], lr=1.0, betas=(moments.beta1, moments.beta2), eps=moments.eps, weight_decay=0.0
            )
            key = name.replace(".default.", ".")
            optimizer.state[theta] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg[key].double(),
                "exp_avg_sq": moments.exp_avg_sq[key].double(),
            }
            theta.grad = value
            optimizer.step()
            parts.append(-theta.detach().flatten())
        return torch.cat(parts)

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.flatten() for value in gradients.values()])

    def units(vectors: list[torch.Tensor]) -> np.ndarray:
        return np.array([(vector / vector.norm()).numpy() for vector in vectors])

    gradients = [gradient(example) for example in load_examples(config)]
    at_zero = adam_step({name: torch.zeros_like(value) for name, value in gradients[0].items()})
    steps = [adam_step(value) - (at_zero if config.marginal else 0) for value in gradients]
    queries = [flat(gradient(example)) for example in load_examples(config, "eval")]
    return units(steps), units([flat(value) for value in gradients]), units(queries)


def read_selection(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "selections" / f"step-{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [True, False])
def test_selections_equal_the_slow_way(options, accumulate):
    config = load_config(options={**options, "accumulate": accumulate})
    folder = dynamic(config)
    rows = np.array([example.row for example in load_examples(config)])
    agg, rates = {}, {}
    for step in (3, 5):
        checkpoint = folder / f"checkpoint-{step}"
        agg[step] = slow_cosines(config, checkpoint).max(axis=0)
        rates[step] = load_moments(checkpoint).learning_rate
    second = (rates[3] * agg[3] + rates[5] * agg[5]) / (rates[3] + rates[5]) if accumulate else agg[5]
    for step, wanted in ((3, agg[3]), (5, second)):
        selection = read_selection(folder, step)
        order = np.argsort(-wanted, kind="stable")[:4]
        assert [line["row"] for line in selection] == rows[order].tolist()
        np.testing.assert_allclose([line["score"] for line in selection], wanted[order], atol=2e-5)
        assert set(selection[0]["subtasks"]) == {"x", "y"}
        assert {line["dataset"] for line in selection} <= {"identity", "alpaca_en_demo"}


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_selection_before_the_first_step_has_that_steps_weight(options, warmup_steps):
    """Its rate is the one of the step about to be taken, which a rising learning rate begins at 0."""
    folder = dynamic(load_config(options={**options, "warmup_step": 0, "warmup_steps": warmup_steps}))
    rates = []
    for step in (0, 2):
        with safe_open(folder / "selections" / f"step-{step}.safetensors", framework="np") as file:
            rates.append(float(file.metadata()["learning_rate"]))
    assert rates == [0.003 if warmup_steps == 0 else 0.0, load_moments(folder / "checkpoint-2").learning_rate]


def test_exact_scores_that_memory_does_not_hold_are_not_begun(options, tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "free_memory", lambda place: 10**3)
    with pytest.raises(DataflexError, match=r"keep a direction of \d+ .* GB are needed and 1e-06 GB are free; use pro"):
        dynamic(load_config(options={**options, "proj_dim": None, "output_dir": str(tmp_path / "out")}))


STORED = {"proj_dim": 8, "projector": "none", "store_dtype": "float32"}


@pytest.mark.parametrize("route", ["exact", "exact in groups", "stored"])
@pytest.mark.parametrize(
    "params",
    [
        {"marginal": True},
        {"contrast": "pool"},
        {"marginal": True, "contrast": 5, "normalise": "rows"},
        {"normalise": "rows", "reduce": "mean"},
        {"reduce": "rows", "contrast": "pool"},
        {"grad_layers": "1", "marginal": True},
    ],
    ids=lambda params: " ".join(params),
)
def test_every_variant_equals_the_slow_way(options, params, route, monkeypatch):
    config = load_config(options={**options, **params, **(STORED if route == "stored" else {})})
    if route == "exact in groups":
        monkeypatch.setattr(exact, "free_memory", lambda device: 4 * 10**5)  # room for one direction, not for two
    folder = dynamic(config)
    rows = np.array([example.row for example in load_examples(config)])
    subtasks = np.array([example.subtask for example in load_examples(config, "eval")])
    found, total, rates = {}, 0, 0
    for step in (3, 5):
        steps, plain, queries = slow_directions(config, folder / f"checkpoint-{step}")
        cosines = queries @ steps.T
        if config.contrast:
            cosines = cosines - (steps @ plain[list(reference_weights(config, len(rows)))].T).mean(axis=1)
        if config.normalise:
            cosines = (cosines - cosines.mean(axis=1, keepdims=True)) / cosines.std(axis=1, keepdims=True)
        rate = load_moments(folder / f"checkpoint-{step}").learning_rate
        if config.reduce != "rows":
            means = np.array([cosines[subtasks == name].mean(axis=0) for name in "xy"])
            cosines = means.mean(axis=0) if config.reduce == "mean" else means.max(axis=0)
        total, rates = total + rate * cosines, rates + rate
        found[step] = total / rates
    for step, scores in found.items():
        selection = read_selection(folder, step)
        if config.reduce == "rows":
            order: list[int] = []
            for turn in range(4):
                order.append(next(i for i in np.argsort(-scores[turn], kind="stable") if i not in order))
            assert [line["score"] for line in selection] == [1 - position / len(rows) for position in range(4)]
        else:
            order = np.argsort(-scores, kind="stable")[:4].tolist()
            atol = 2e-3 if config.normalise else 3e-5  # standardising divides by a small spread
            np.testing.assert_allclose([line["score"] for line in selection], scores[order], atol=atol)
        assert [line["row"] for line in selection] == rows[order].tolist()


@pytest.mark.parametrize("route", ["exact", "stored"])
@pytest.mark.parametrize("params", [{}, {"contrast": "pool", "marginal": True}, {"accumulate": False}], ids=str)
@pytest.mark.parametrize("prefilter", [None, "bm25"])
def test_candidates_alone_are_scored_anew(options, params, route, prefilter):
    config = load_config(
        options={
            **options,
            **params,
            **(STORED if route == "stored" else {}),
            "candidates": 0.5,
            "prefilter": prefilter,
            "reduce": "mean",
        }
    )
    folder = dynamic(config)
    examples = load_examples(config)
    subtasks = np.array([example.subtask for example in load_examples(config, "eval")])
    rows, count = np.array([example.row for example in examples]), len(examples)
    last, weights, scores, anew = np.full(count, np.nan), [], [], []
    for step in (3, 5):
        chosen = None
        if scores or prefilter:
            known = [line["row"] for line in read_selection(folder, 3)] if scores else None
            if not scores:
                tokenizer = AutoTokenizer.from_pretrained(options["model_name_or_path"])
                texts = [
                    [words(tokenizer.decode(row.input_ids, skip_special_tokens=True)) for row in part]
                    for part in (examples, load_examples(config, "eval"))
                ]
                found = np.array(list(bm25(*texts)), dtype=np.float64)
                last = np.mean([found[subtasks == name].mean(axis=0) for name in "xy"], axis=0)
            chosen = choose_candidates(last, 0.5, np.random.default_rng((config.seed, 4, step)))
            assert len(chosen.indices) == count // 2
            if known is not None:
                assert set(np.flatnonzero(np.isin(rows, known))) <= set(chosen.best)
        steps, plain, queries = slow_directions(config, folder / f"checkpoint-{step}")
        indices = chosen.indices if chosen else np.arange(count)
        cosines = queries @ steps.T
        if config.contrast:
            by_row = chosen.weights if chosen else np.ones(count)
            mean = (by_row[:, None] * plain[indices]).sum(axis=0) / by_row.sum()
            cosines = cosines - steps @ mean
        now = np.full((2, count), np.nan) if not scores else scores[-1].copy()
        now[:, indices] = np.array([cosines[subtasks == name].mean(axis=0) for name in "xy"])[:, indices]
        scores.append(now)
        anew.append(np.isin(np.arange(count), indices))
        weights.append(load_moments(folder / f"checkpoint-{step}").learning_rate)
        past = [now]
        if len(scores) == 2:
            past.insert(0, scores[0].copy())
            for before, after in zip(past[0], now, strict=True):
                both = anew[0] & anew[1]
                before[~anew[0]] = np.polyval(np.polyfit(after[both], before[both], 1), after[~anew[0]])
        last = (now if not config.accumulate else np.average(past, axis=0, weights=weights)).mean(axis=0)
        selection = read_selection(folder, step)
        order = np.argsort(-last, kind="stable")[:4]
        assert [line["row"] for line in selection] == rows[order].tolist()
        np.testing.assert_allclose([line["score"] for line in selection], last[order], atol=3e-5)


def test_a_prefilter_that_leaves_too_few_rows_is_refused(options):
    config = load_config(options={**options, "candidates": 0.1, "prefilter": "bm25"})
    with pytest.raises(UsageError, match=r"takes 4 rows, and of 24 rows the prefilter leaves 2.*candidates to 0\.17"):
        dynamic(config)


def test_a_layer_that_has_no_pair_is_refused(options):
    with pytest.raises(UsageError, match=r"grad_layers 1-9: .* no pair in layer 2; it has pairs in layers 0 to 1"):
        dynamic(load_config(options={**options, "grad_layers": "1-9"}))


def test_stored_scores_without_projection_equal_exact_ones(options, tmp_path):
    exact = dynamic(load_config(options=options))
    stored = dynamic(
        load_config(
            options={
                **options,
                **STORED,
                "cache_dir": str(tmp_path / "cache"),
                "output_dir": str(tmp_path / "stored"),
            }
        )
    )
    for step in (3, 5):
        one, other = read_selection(exact, step), read_selection(stored, step)
        assert [line["row"] for line in one] == [line["row"] for line in other]
        np.testing.assert_allclose([line["score"] for line in one], [line["score"] for line in other], atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "cache" / "step-3").iterdir()) == ["eval.h5", "train.h5"]
    assert not (exact / "gradients").exists()


def test_a_selection_changes_nothing_in_the_training(options, tmp_path):
    """Warm-up weights with selections to come equal those of a run without any, dropout included; and a run
    whose selections are forced to be the rows of another is that other run."""
    selecting = dynamic(load_config(options=options))
    plain = dynamic(
        load_config(options={**options, "update_times": 0, "max_steps": 3, "output_dir": str(tmp_path / "p")})
    )
    first, second = (load_file(f / "checkpoint-3" / "adapter_model.safetensors") for f in (selecting, plain))
    assert first.keys() == second.keys()
    # the learning rate's horizon differs between the two runs, so only the first step can be compared bit by bit
    first, second = (load_file(f / "checkpoint-1" / "adapter_model.safetensors") for f in (selecting, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)

    # another token budget cuts other batches; where the picks agree, so do the weights, bit by bit
    again = dynamic(load_config(options={**options, "token_budget": 1000, "output_dir": str(tmp_path / "again")}))
    assert [line["row"] for line in read_selection(again, 3)] == [line["row"] for line in read_selection(selecting, 3)]
    first, second = (load_file(f / "checkpoint-5" / "adapter_model.safetensors") for f in (selecting, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_run_is_on_record(options):
    folder = dynamic(load_config(options={**options, "plot_loss": True}))
    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] == 7
    assert [one["step"] for one in run["selections"]] == [3, 5]
    assert sum(run["selections"][0]["picked"].values()) == 4
    assert run["pool"] == {"identity": 12, "alpaca_en_demo": 12}
    assert run["eval_loss"]["after"] < run["eval_loss"]["before"]
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert dynamic_schedule(load_config(folder / "config.yaml")).total_steps == 7
    assert run["finished"] is True


def test_a_selection_larger_than_the_data_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(UsageError, match=r"each selection takes 40 rows .* but the dataset has 24"):
        dynamic(load_config(options={**options, "update_step": 20}))
    assert not (tmp_path / "out").exists()


def test_random_selection_is_random_but_repeatable(options, tmp_path):
    picks = []
    for number in range(2):
        config = load_config(options={**options, "component_name": "random", "output_dir": str(tmp_path / str(number))})
        picks.append([line["row"] for line in read_selection(dynamic(config), 3)])
    assert picks[0] == picks[1]
    assert len(set(picks[0])) == 4


def test_the_planted_target_is_found(options, data_dir, tmp_path):
    """Rows like the target among rows of the same format that are not: they fill the selection. With a target
    that has nothing to do with them, they do not."""
    planted = [{"instruction": f"Name colour {i}", "input": "", "output": f"blue green red {i}"} for i in range(8)]
    other = [{"instruction": f"Count to {i}", "input": "", "output": f"{i} one two three {i}"} for i in range(40)]
    pool, right, wrong = tmp_path / "pool.jsonl", tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in other[:20] + planted[:4] + other[20:]))
    right.write_text("".join(json.dumps(row) + "\n" for row in planted[4:]))
    wrong.write_text("".join(json.dumps(row) + "\n" for row in other[36:]))
    shares = []
    for name, target in (("right", right), ("wrong", wrong)):
        settings = {
            "dataset": str(pool),
            "eval_dataset": str(target),
            "max_samples": 100,
            "output_dir": str(tmp_path / name),
        }
        selection = read_selection(dynamic(load_config(options={**options, **settings, "proj_dim": 2048})), 3)
        shares.append(sum(20 <= line["row"] < 24 for line in selection))
    assert shares[0] >= 3
    assert shares[1] <= 1


@pytest.mark.parametrize(("selector", "times"), [("less", 1), ("less+rds", 0)])
def test_a_projection_that_blurs_the_scores_is_warned_of_once(options, selector, times):
    """At the first of two selections, and where the projected scores are the scores."""
    settings = {"max_samples": 20, "proj_dim": 4, "save_steps": 100, "component_name": selector}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dynamic(load_config(options={**options, **settings}))
    assert sum("the projection to 4 numbers blurs" in str(one.message) for one in said) == times
