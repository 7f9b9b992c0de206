"""`bench` measures both sides on the same rows and accounts for all of its time."""

from __future__ import annotations

import pytest

from dataflex import bench, load_config
from dataflex.benchmark import sample


@pytest.mark.parametrize("changes", [{}, {"projector": "rademacher", "proj_dim": 64}, {"bf16": True}])
def test_the_figures(tiny_model_dir, data_dir, changes):
    options = {
        "model_name_or_path": str(tiny_model_dir),
        "dataset": "identity",
        "dataset_dir": str(data_dir),
        "template": "qwen",
        "lora_rank": 4,
        "token_budget": 256,
        **changes,
    }
    found = bench(load_config(options=options))
    assert found["dtype"] == ("bfloat16" if "bf16" in changes else "float32")
    assert found["ratio"] == pytest.approx(found["grads"]["tokens_per_s"] / found["train"]["tokens_per_s"])
    assert set(found["grads"]["seconds"]) == {"model", "direction", "projection", "write"}
    assert all(seconds > 0 for seconds in found["grads"]["seconds"].values())
    spent = sum(found["grads"]["seconds"].values())
    assert found["sample"]["tokens"] / spent == pytest.approx(found["grads"]["tokens_per_s"])
    assert found["matmul_flops_per_s"] > found["grads"]["flops_per_s"] > 0
    assert found["dataset"]["rows"] == 91
    assert found["sample"]["batches"] == 4
    assert min(found["peak_memory_bytes"].values()) > 10**8


def test_the_sample_spans_the_lengths():
    assert sample([[index] for index in range(10)]) == [[0], [3], [6], [9]]
    assert sample([[0], [1]]) == [[0], [1]]
    assert sample([[0]]) == [[0]]
