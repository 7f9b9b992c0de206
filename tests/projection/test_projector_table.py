"""The table of projectors: every class in it makes, checks and describes itself, and nothing names one elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataflex import load_config
from dataflex.data.examples import load_split
from dataflex.errors import UsageError
from dataflex.gradients.capture import make_capture
from dataflex.gradients.collect import manifest_of
from dataflex.model import add_lora, load_base_model, load_tokenizer
from dataflex.projection.table import PROJECTORS, check_projector, make_projector, projector_class
from dataflex.provenance import device_name

PARAMETERS, DIM = 3000, 512
EVERYWHERE = [name for name in PROJECTORS if name != "fast_jl"]


def test_every_projector_is_one_of_the_protocol():
    for name, entry in PROJECTORS.items():
        found = projector_class(name)
        assert f"{found.__module__}:{found.__qualname__}" == entry.source
        assert not found.__abstractmethods__
        assert entry.help


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_projector_is_made_as_wide_as_it_says(name: str):
    check_projector(name, DIM, torch.device("cpu"))
    projector = make_projector(name, PARAMETERS, DIM, 1, "cpu")
    assert projector.dim == projector_class(name).width(PARAMETERS, DIM)
    assert projector.dim == (PARAMETERS if name == "none" else DIM)
    out = torch.zeros(2, projector.dim)
    projector.add(out, 0, torch.ones(2, PARAMETERS))
    assert out.any(dim=1).all()


def test_the_projector_of_a_gpu_is_refused_without_one():
    assert projector_class("fast_jl").width(PARAMETERS, DIM) == DIM
    for check in (
        lambda: check_projector("fast_jl", DIM, torch.device("cpu")),
        lambda: make_projector("fast_jl", PARAMETERS, DIM, 1, "cpu"),
    ):
        with pytest.raises(UsageError, match="fast_jl runs on a CUDA GPU, and there is none; use projector=sketch"):
            check()


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_manifest_says_what_a_projection_depends_on(name: str, tiny_run: dict):
    config = load_config(options={**tiny_run, "projector": name, "max_samples": 2})
    tokenizer = load_tokenizer(config)
    model = add_lora(load_base_model(config, torch.float32), config)
    capture = make_capture(model, torch.float32, tokenizer.pad_token_id, 200)
    split = load_split(config, tokenizer, "train")
    manifest = manifest_of(config, capture, split, "train", None)
    assert manifest.settings["projector"] == name
    assert manifest.proj_dim == (capture.parameters if name == "none" else 512)
    assert manifest.projector_device == (device_name() if name == "fast_jl" else None)


def test_a_name_that_is_not_in_the_table():
    with pytest.raises(UsageError, match=r"no projector 'sketsh'; there are .*none; did you mean 'sketch'\?"):
        make_projector("sketsh", PARAMETERS, DIM, 1, "cpu")


def test_configuration_and_table_agree():
    for name in PROJECTORS:
        assert load_config(overrides=[f"projector={name}"]).projector == name
    with pytest.raises(UsageError, match=r"key 'projector': no projector 'scetch'.*did you mean 'sketch'"):
        load_config(overrides=["projector=scetch"])


def test_only_the_table_tells_projectors_apart_by_name(repo: Path):
    """A projector is added in its own file and in the table, so no other code may ask for one by name."""
    told_apart = [
        f"{path.relative_to(repo)}: {line.strip()}"
        for folder in ("dataflex", "commands")
        for path in sorted((repo / folder).rglob("*.py"))
        if path.parent.name != "projection"
        for line in path.read_text(encoding="utf-8").splitlines()
        for name in PROJECTORS
        if f'projector == "{name}"' in line or f'projector != "{name}"' in line or f'name == "{name}"' in line
    ]
    assert told_apart == []


def test_the_table_is_read_without_torch():
    code = "import sys, dataflex.projection.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
