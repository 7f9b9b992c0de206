"""A small LoRA model whose adapter has been trained a little, so that neither A nor B is zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_rows import row

from dataflex import load_config
from dataflex.data.examples import Example
from dataflex.model import add_lora, load_base_model


@pytest.fixture
def lora_model(tiny_model_dir: Path) -> torch.nn.Module:
    config = load_config(options={"model_name_or_path": str(tiny_model_dir), "lora_rank": 4, "lora_dropout": 0.3})
    model = add_lora(load_base_model(config, torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


@pytest.fixture
def rows() -> list[Example]:
    """Very different lengths, and one row with a single supervised token."""
    return [
        row(0, 90, list(range(40, 90))),
        row(1, 12, [11]),
        row(2, 5, [2, 3, 4]),
        row(3, 61, list(range(1, 30)) + list(range(50, 61))),
        row(4, 33, list(range(33))),
    ]
