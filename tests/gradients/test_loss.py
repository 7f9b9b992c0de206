"""Losses in chunks of supervised positions, against transformers' own loss on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dataflex.data.batches import collate
from dataflex.gradients import loss
from dataflex.gradients.loss import (
    chunked_losses,
    position_losses_of,
    row_losses,
    supervised_losses,
    whole_losses,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 49152,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, True),
    "soft cap": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.5}, False),
    "multiplied": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}, False),
    "divided": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}, False),
}


def make(name: str) -> tuple[nn.Module, bool]:
    model, config, more, plain = MODELS[name]
    torch.manual_seed(0)
    return model(config(**SIZES, **more)).eval(), plain


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_more_to_it_is_told_apart(name, dtype):
    model, plain = make(name)
    wanted = chunked_losses if plain else supervised_losses
    assert position_losses_of(model.to(dtype), torch.device("cpu")) is wanted


def test_a_head_with_an_adapter_is_told_apart():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make("llama")[0], LoraConfig(target_modules=["lm_head"], r=2, task_type="CAUSAL_LM"))
    assert position_losses_of(adapted, torch.device("cpu")) is whole_losses


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("path", "positions", "floats"),
    [
        (chunked_losses, 1, 1 << 27),
        (chunked_losses, 7, 1 << 27),
        (chunked_losses, 10**6, 10**12),
        (chunked_losses, 10**6, 10**5),
        (supervised_losses, 1, 1),
        (whole_losses, 1, 1),
    ],
)
def test_each_row_has_the_loss_and_the_gradient_of_whole_logits(name, path, positions, floats, rows, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", positions)
    monkeypatch.setattr(loss, "MAX_FLOATS", floats)
    model, plain = make(name)
    if path is chunked_losses and not plain:
        path = position_losses_of(model, torch.device("cpu"))
    batch = collate(rows, pad_token_id=0)
    found = row_losses(model, batch["input_ids"], batch["labels"], path)
    weights = torch.arange(1.0, len(rows) + 1)  # every row's gradient is scaled by its own
    (gradient,) = torch.autograd.grad((found.loss * weights).sum(), model.model.norm.weight)
    wanted = torch.zeros_like(gradient)
    for index, row in enumerate(rows):
        one = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        assert found.loss[index].item() == pytest.approx(one.item(), rel=1e-5)
        wanted += weights[index] * torch.autograd.grad(one, model.model.norm.weight)[0]
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
