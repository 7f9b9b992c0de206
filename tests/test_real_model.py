"""SmolLM2-135M and real rows: what holds on a tiny model holds here."""

from __future__ import annotations

import pytest
import torch

from dataflex import load_config
from dataflex.data.batches import collate
from dataflex.data.examples import load_split
from dataflex.gradients.backward import adapter_values, row_gradients
from dataflex.gradients.capture import make_capture
from dataflex.gradients.forward_state import undisturbed
from dataflex.gradients.passes import project_rows
from dataflex.model import add_lora, load_base_model, load_tokenizer
from dataflex.projection.identity import Identity
from dataflex.projection.sketch import Sketch


@pytest.fixture(scope="module")
def trained(model_dir, data_dir):
    """The model with an adapter that is no longer zero, and eight rows of three datasets."""
    options = {
        "model_name_or_path": str(model_dir),
        "dataset": "alpaca_en_demo,identity,glaive_toolcall_en_demo",
        "dataset_dir": str(data_dir),
        "template": "smollm2",
        "cutoff_len": 96,
        "max_samples": 3,
        "lora_rank": 16,
    }
    config = load_config(options=options)
    tokenizer = load_tokenizer(config)
    rows = list(load_split(config, tokenizer).examples)
    model = add_lora(load_base_model(config, torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    return model, make_capture(model, torch.float32, tokenizer.pad_token_id, 1024), rows


def test_batched_rows_equal_batches_of_one(trained):
    model, capture, rows = trained
    chosen = [rows[0], rows[3], rows[8]]
    assert len({len(example.input_ids) for example in chosen}) > 1
    batch = collate(chosen, capture.pad_token_id)
    found: dict[str, torch.Tensor] = {}
    with undisturbed(model):
        row_gradients(
            model,
            capture.pairs,
            capture.slots,
            adapter_values(capture.pairs),
            batch["input_ids"],
            batch["labels"],
            lambda slot, gradient: found.__setitem__(slot.name, gradient.clone()),
        )
    model.eval()
    for index, example in enumerate(chosen):
        model.zero_grad()
        model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss.backward()
        for slot in capture.slots:
            wanted = slot.parameter.grad.flatten()
            assert (found[slot.name][index] - wanted).norm() <= 1e-5 * wanted.norm(), (example.row, slot.name)
    model.zero_grad()


def test_the_sketch_keeps_the_cosines_of_real_gradients(trained):
    _, capture, rows = trained
    batches = [list(range(len(rows)))]

    def unit(projector) -> torch.Tensor:
        [done] = project_rows(capture, rows, batches, lambda slot, gradient: gradient, projector)
        return done.vectors / done.vectors.norm(dim=1, keepdim=True)

    whole, small = unit(Identity(capture.parameters)), unit(Sketch(capture.parameters, 8192, 123))
    # the standard error of a cosine is at most sqrt(2/k), 0.016
    assert ((whole @ whole.T) - (small @ small.T)).abs().max() < 4 * 0.016
