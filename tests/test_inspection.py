from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dataflex.config import RunConfig
from dataflex.errors import UsageError
from dataflex.inspection import Inspection, inspect
from dataflex.store.manifest import Manifest
from dataflex.store.writer import StoreWriter, create_store

MANIFEST = {
    **{"store_dtype": "float16", "proj_dim": 8, "parameters": [["a", 8]], "dataset": ["d"], "datasets": [["d", 0]]},
    **{"template": "llama3", "gradient_type": "adam", "step": 7, "learning_rate": 0.5, "projector": "sketch"},
}
ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, {"instruction": "c", "output": "d"}]


def look(target: object, **keys: object) -> Inspection:
    return inspect(target, RunConfig(**keys))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "train.h5"
    rows = np.array([0, 2, 5])
    create_store(
        path,
        manifest=Manifest.from_json(json.dumps(MANIFEST)),
        row=rows,
        tokens=np.array([3, 4, 5]),
        subtask=["x", "", "y"],
    )
    with StoreWriter(path) as writer:
        writer.write([0, 2], np.ones((2, 8), dtype=np.float32), np.array([1.0, 3.0]))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoint-12"
    folder.mkdir(parents=True)
    weights = {"a.lora_A.weight": np.zeros((2, 3), np.float32), "a.lora_B.weight": np.zeros((3, 2), np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"r": 2, "base_model_name_or_path": "m", "target_modules": ["b", "a"]}'
    )
    moments = {f"{kind}/{name}": value for name, value in weights.items() for kind in ("exp_avg", "exp_avg_sq")}
    numbers = {"step": "12", "learning_rate": "1e-4", "beta1": "0.9", "beta2": "0.999", "eps": "1e-8"}
    save_file(moments, folder / "moments.safetensors", metadata=numbers)
    return folder


def test_a_store(store: Path) -> None:
    found = look(store)
    assert (found.kind, found.whole, found.problems) == ("store", False, ["1 of 3 rows are not done (first: row 2)"])
    expected = {"rows": 3, "done": 2, "dimensions": 8, "template": "llama3", "step": 7, "subtasks": ["x", "y"]}
    assert expected.items() <= found.facts.items()
    assert found.facts["mean_loss"] == 2.0
    with StoreWriter(store) as writer:
        writer.write([1], np.ones((1, 8), dtype=np.float32), np.array([1.0]))
    assert look(store.rename(store.with_name("no suffix"))).whole


def test_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    lines = [{"row": 3, "dataset": "d", "score": 0.5, "subtasks": {"s": 0.5}}, {"row": 1, "dataset": "e", "score": -1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = look(path)
    assert (found.kind, found.whole) == ("scores", True)
    assert found.facts == {
        **{"rows": 2, "rows_from": 1, "rows_to": 3, "score_max": 0.5, "score_mean": -0.25, "score_min": -1.0},
        **{"subtasks": ["s"], "datasets": {"d": 1, "e": 1}},
    }
    lines = [
        {"row": 3, "score": 0.5, "subtasks": {"s": 0.5, "t": 0.1}},
        {"row": 4, "score": 1, "subtasks": {"s": 0.2, "t": 1}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_s, of_t = {"rows": 1, "best_row": 3, "best": 0.5}, {"rows": 1, "best_row": 4, "best": 1.0}
    assert look(path).facts["winners"] == {"s": of_s, "t": of_t}
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(UsageError, match="line 3"):
        look(path)


def test_a_subset(tmp_path: Path) -> None:
    path = tmp_path / "subset.jsonl"
    lines = [{**ROWS[0], "dataflex": {"row": number, "score": score}} for number, score in ((4, 0.5), (1, 0.25))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = look(path)
    assert (found.kind, found.whole) == ("subset", True)
    assert {"rows": 2, "selected": 2, "score_max": 0.5, "score_min": 0.25}.items() <= found.facts.items()
    path.write_text(path.read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UsageError, match=r"record 3: no dataflex\.score"):
        look(path)


def test_a_dataset_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"named": {"file_name": "rows.json"}}))
    for target, keys in ((tmp_path / "rows.json", {}), ("named", {"dataset_dir": str(tmp_path)})):
        found = look(target, eval_dataset="other", **keys)
        assert (found.kind, found.data, found.example) == ("dataset", None, None)
        assert found.problems == ["row 1: no response (1 rows so)"]
        assert (found.facts["rows"], found.facts["formatting"]) == (3, ["alpaca"])
        assert found.facts["files"] == [str(tmp_path / "rows.json")]
    with pytest.raises(UsageError, match="'namd' is not in"):
        look("namd", dataset_dir=str(tmp_path))


def test_a_dataset_as_the_model_sees_it(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    found = look(tmp_path / "rows.json", model_name_or_path=str(model_dir), template="smollm2", val_size=0.5)
    assert (found.data["rows"], found.data["kept"], found.data["first_dropped"]) == (3, 2, {"no response": 1})
    assert found.example["row"] == 0
    assert found.example["spans"][-1] == {"text": "b<|im_end|>\n", "supervised": True}
    assert json.loads(json.dumps(found.as_dict()))["whole"] is False


def test_a_checkpoint(checkpoint: Path) -> None:
    found = look(checkpoint)
    assert (found.kind, found.problems) == ("checkpoint", [])
    expected = {"r": 2, "tensors": 2, "parameters": 12, "step": 12, "learning_rate": 1e-4, "target_modules": ["a", "b"]}
    assert expected.items() <= found.facts.items()


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("moments.safetensors", None, "moments.safetensors is missing; gradients of type adam need it"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_model.safetensors", -1, "adapter_model.safetensors is not whole"),
        ("adapter_config.json", 5, "adapter_config.json cannot be read"),
    ],
)
def test_a_checkpoint_that_lacks_something(checkpoint: Path, name: str, size: int | None, problem: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    (found,) = look(checkpoint).problems
    assert found.startswith(problem)


def test_moments_of_another_adapter(checkpoint: Path) -> None:
    save_file({"a.lora_A.weight": np.zeros((2, 4), np.float32)}, checkpoint / "adapter_model.safetensors")
    assert look(checkpoint).problems == ["moments.safetensors is of another adapter than adapter_model.safetensors"]


def test_an_output_directory(checkpoint: Path) -> None:
    folder = checkpoint.parent
    (folder / "run.json").write_text('{"command": "dynamic", "finished": false, "origin": {"seed": 1}, "rows": 9}')
    (folder / "trainer_log.jsonl").write_text(
        '{"current_steps": 11, "total_steps": 20}\n{"eval_loss": 2, "current_steps": 12, "total_steps": 20}\n'
    )
    (folder / "selections").mkdir()
    for step in (4, 10):
        (folder / "selections" / f"step-{step}.jsonl").touch()
    found = look(folder)
    assert found.kind == "output directory"
    assert found.facts == {
        **{"command": "dynamic", "finished": False, "rows": 9, "current_steps": 12, "total_steps": 20},
        **{"checkpoints": ["checkpoint-12"], "selections_at": [4, 10]},
    }
    assert found.problems == ["the run has not ended; the same command goes on from where it is"]

    (folder / "run.json").write_text('{"command": "dynamic", "finished": true}')
    (checkpoint / "moments.safetensors").unlink()
    assert [problem.split(" ")[0] for problem in look(folder).problems] == [
        *("adapter_model.safetensors", "adapter_config.json", "checkpoint-12:"),
    ]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    assert len(look(folder).problems) == 1


def test_what_is_nothing_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a checkpoint"):
        look(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        look(tmp_path / "gone.jsonl")
    (tmp_path / "a.h5").write_bytes(b"text")
    with pytest.raises(UsageError, match="not a readable HDF5 file"):
        look(tmp_path / "a.h5")
