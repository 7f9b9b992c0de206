"""A GPU gives the processor's numbers. Run it by `make test-gpu`; `make test` hides GPUs."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import dataflex
from dataflex import load_config, open_store
from dataflex.data.examples import load_split
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.model import add_lora, device, load_base_model, load_tokenizer
from dataflex.projection.identity import Identity
from dataflex.projection.protocol import Projector
from dataflex.projection.table import make_projector

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    place = device()
    if place.type == "cpu":
        pytest.fail("there is no GPU that torch can use", pytrace=False)
    return place


@pytest.fixture(scope="module")
def trained(tiny_run):
    """A model on the processor whose adapter is no longer zero, its rows and its padding token."""
    config = load_config(options=tiny_run)
    tokenizer = load_tokenizer(config)
    model = add_lora(load_base_model(config, torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model, list(load_split(config, tokenizer).examples), tokenizer.pad_token_id


def gradients(capture: Capture, rows: list, projector: Projector) -> torch.Tensor:
    vectors = torch.zeros(len(rows), projector.dim)
    for done in project_rows(capture, rows, batches_of(capture, rows, projector.dim), lambda slot, g: g, projector):
        vectors[done.indices] = done.vectors.cpu()
    return vectors


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)


@pytest.mark.parametrize("name", ["sketch", "rademacher"])
def test_projections_are_equal(gpu, name):
    """Of small integers, so that sums are exact in any order; the processor's numbers are pinned elsewhere."""
    vectors = (torch.arange(15000, dtype=torch.float32) % 17 - 8).view(3, 5000)
    found = []
    for place in ("cpu", gpu):
        out = torch.zeros(3, 256, device=place)
        make_projector(name, 5000, 256, 123, place).add(out, 0, vectors.to(place, copy=True))
        found.append(out.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_equal(gpu, trained, fused):
    model, rows, pad = trained
    on_cpu = make_capture(model, torch.float32, pad, 200)
    on_gpu = make_capture(copy.deepcopy(model).to(gpu), torch.float32, pad, 200)
    exact = gradients(on_cpu, rows, Identity(on_cpu.parameters))
    found = gradients(replace(on_gpu, fused=fused), rows, Identity(on_gpu.parameters))
    assert cosines(exact, found).min() > 1 - 1e-6


def test_fast_jl_keeps_inner_products(gpu, trained):
    if find_spec("fast_jl") is None:
        pytest.skip("the package fast_jl is not installed")
    model, rows, pad = trained
    capture = make_capture(copy.deepcopy(model).to(gpu), torch.float32, pad, 200)
    exact = gradients(capture, rows, Identity(capture.parameters))
    image = gradients(capture, rows, make_projector("fast_jl", capture.parameters, 8192, 1, gpu))
    norms = exact.norm(dim=1)
    error = (image @ image.T - exact @ exact.T) / torch.outer(norms, norms)
    assert error.abs().max() < 6 * (2 / 8192) ** 0.5


@pytest.fixture(scope="module")
def checkpoint(gpu, tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("warmup")
    dataflex.warmup(load_config(options={**tiny_run, "output_dir": str(folder)}))
    return folder / "checkpoint-3"


@pytest.mark.parametrize(("bf16", "least"), [(False, 1 - 1e-5), (True, 0.999)])
def test_stores_and_exact_scores_are_equal(gpu, tiny_run, checkpoint, run_cli, tmp_path, bf16, least):
    for split in ("train", "eval"):
        options = {**tiny_run, "checkpoint": str(checkpoint), "split": split, "bf16": bf16, "store_dtype": "float32"}
        dataflex.grads(load_config(options={**options, "output": str(tmp_path / f"gpu-{split}.h5")}))
        words = [f"{key}={value}" for key, value in options.items()]
        run_cli("grads", *words, "-o", tmp_path / f"cpu-{split}.h5", env=HIDDEN)
        with open_store(tmp_path / f"gpu-{split}.h5") as ours, open_store(tmp_path / f"cpu-{split}.h5") as theirs:
            one, other = (torch.from_numpy(np.stack([s[i] for i in range(len(s))])) for s in (ours, theirs))
        assert cosines(one, other).min() > least
    options = {**tiny_run, "checkpoint": str(checkpoint), "bf16": bf16, "exact": True}
    dataflex.score(load_config(options={**options, "output": str(tmp_path / "gpu.jsonl")}))
    words = [f"{key}={value}" for key, value in options.items()]
    run_cli("score", *words, "-o", tmp_path / "cpu.jsonl", env=HIDDEN)
    ours, theirs = (
        [json.loads(line)["score"] for line in (tmp_path / f"{place}.jsonl").read_text().splitlines()]
        for place in ("gpu", "cpu")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5 if not bf16 else 5e-3)


@pytest.mark.parametrize("proj_dim", [512, None])
def test_a_run_picks_the_same_rows(gpu, tiny_run, run_cli, tmp_path, proj_dim):
    options = {**tiny_run, "proj_dim": proj_dim}
    dataflex.dynamic(load_config(options={**options, "output_dir": str(tmp_path / "gpu")}))
    words = [f"{key}={'null' if value is None else value}" for key, value in options.items()]
    run_cli("dynamic", *words, f"output_dir={tmp_path / 'cpu'}", env=HIDDEN)
    for step in (3, 5):
        picks = [
            [json.loads(line)["row"] for line in (tmp_path / place / f"selections/step-{step}.jsonl").open()]
            for place in ("gpu", "cpu")
        ]
        assert picks[0] == picks[1]


def test_bench_accounts_for_its_time(gpu, tiny_run):
    started = time.perf_counter()
    found = dataflex.bench(load_config(options={**tiny_run, "bf16": True}))
    passed = time.perf_counter() - started
    assert all(seconds > 0 for seconds in found["grads"]["seconds"].values())
    assert sum(found["sample"]["tokens"] / found[side]["tokens_per_s"] for side in ("train", "grads")) < passed
    assert found["matmul_flops_per_s"] > found["grads"]["flops_per_s"] > 0
    assert min(found["peak_memory_bytes"].values()) > 0
