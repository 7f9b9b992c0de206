"""Memory and arithmetic from a model's shape, and the batch that follows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from dataflex.cost import (
    Shape,
    free_memory,
    gradient_flops,
    gradient_memory,
    matmul_speed,
    multiplied_weights,
    shape_of,
    token_budget_for,
    training_flops,
    training_memory,
)
from dataflex.gradients.backward import adapter_values, row_gradients
from dataflex.gradients.capture import make_capture
from dataflex.gradients.forward_state import undisturbed
from dataflex.gradients.loss import chunked_losses

LLAMA_8B = Shape(8_030_000_000, 42_000_000, 32, 4096, 14336, vocabulary=128_256, itemsize=2)


@pytest.mark.parametrize(
    ("free", "place", "tokens"),
    [
        (80e9, "cuda", 4096),
        (24e9, "cuda", 1024),
        (1e9, "cuda", 256),  # the fewest: what does not fit is halved when it shows
        (1e13, "cuda", 16384),
        (1e13, "cpu", 2048),
    ],
)
def test_the_token_budget_is_a_power_of_two_that_fits(free, place, tokens):
    assert token_budget_for(LLAMA_8B, free, place) == tokens


def test_an_unknown_shape_gets_a_modest_budget():
    assert token_budget_for(None, 80e9, "cuda") == 2048


def test_a_shape_is_read_from_a_configuration():
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=1000)
    assert shape_of(config, 5, 3, 4) == Shape(5, 3, 2, 64, 128, 1000, 4)
    assert shape_of(GPT2Config(), 5, 3, 4) is None  # it has other names for them


def test_training_takes_more_than_gradients_do_and_checkpointing_less():
    whole = training_memory(LLAMA_8B, 2048, checkpointing=False)
    assert whole > gradient_memory(LLAMA_8B, 2048) > LLAMA_8B.standing_bytes
    assert training_memory(LLAMA_8B, 2048, checkpointing=True) < whole


def test_free_memory_is_what_the_machine_has_left():
    assert 2**28 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("tied", [True, False])
def test_the_arithmetic_is_what_torch_counts(tied):
    """But for the first layer, below whose adapters nothing is computed."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 500}
    config = LlamaConfig(**sizes, num_hidden_layers=8, tie_word_embeddings=tied)
    base = LlamaForCausalLM(config)
    weights = multiplied_weights(base)
    assert weights[1] == 500 * 64
    assert sum(weights) == base.num_parameters() - (0 if tied else 500 * 64)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    capture = make_capture(model, torch.float32, 0, 1024)
    labels = torch.randint(0, 500, (4, 32))
    labels[:, :20] = -100
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **rest: 2 * left[0] * left[1] * right[1]}
    counted = FlopCounterMode(display=False, custom_mapping=in_place)
    with undisturbed(model), counted:
        values, taken = adapter_values(capture.pairs), []
        row_gradients(
            model,
            capture.pairs,
            capture.slots,
            values,
            labels.clamp(0),
            labels,
            lambda slot, gradient: taken.append(slot),
            position_losses=chunked_losses,
        )
    assert len(taken) == len(capture.slots)
    products = {op: n for op, n in counted.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    wanted = gradient_flops(*weights, capture.parameters, labels.numel(), 4 * 12)
    assert sum(products.values()) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_arithmetic_of_training_is_what_torch_counts(checkpointing):
    """But for the first layer, below whose adapters nothing is computed, and for what is recomputed of it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 500}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=8))
    weights = multiplied_weights(base)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.randint(0, 500, (4, 32))
    with FlopCounterMode(display=False) as counted:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    products = {op: n for op, n in counted.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    adapter = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    wanted = training_flops(*weights, adapter, ids.numel(), checkpointing)
    assert sum(products.values()) == pytest.approx(wanted, rel=0.03)


def test_the_speed_of_a_product_is_one_of_this_age():
    assert 1e8 < matmul_speed(torch.device("cpu"), torch.float32) < 1e15
