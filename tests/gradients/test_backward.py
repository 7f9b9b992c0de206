"""Batched per-row gradients against plain autograd on a batch of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataflex.data.batches import collate
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.backward import TokensMixed, adapter_values, can_fuse, row_gradients
from dataflex.gradients.capture import make_capture
from dataflex.gradients.forward_state import undisturbed
from dataflex.gradients.loss import row_losses, whole_losses
from dataflex.gradients.passes import batches_of, mean_loss, project_rows
from dataflex.lora import layout, lora_pairs
from dataflex.projection.identity import Identity


def autograd_gradients(model: torch.nn.Module, example) -> tuple[dict[str, torch.Tensor], float]:
    """The oracle: transformers' own loss on one row, and autograd's gradient of every LoRA tensor."""
    model.eval()
    model.zero_grad()
    batch = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
    loss = model(**batch).loss
    loss.backward()
    gradients = {slot.name: slot.parameter.grad.clone() for slot in layout(lora_pairs(model))}
    model.zero_grad()
    return gradients, loss.item()


def batched_gradients(model: torch.nn.Module, rows, fused: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    pairs = lora_pairs(model)
    batch = collate(rows, pad_token_id=0)
    found: dict[str, torch.Tensor] = {}
    with undisturbed(model):
        losses = row_gradients(
            model,
            pairs,
            layout(pairs),
            adapter_values(pairs),
            batch["input_ids"],
            batch["labels"],
            lambda slot, gradient: found.__setitem__(slot.name, gradient.clone()),
            fused=fused,
        )
    return found, losses.loss


@pytest.mark.parametrize("fused", [True, False])
def test_a_padded_batch_gives_each_row_its_own_gradient(lora_model, rows, fused):
    found, losses = batched_gradients(lora_model, rows, fused)
    for index, example in enumerate(rows):
        wanted, loss = autograd_gradients(lora_model, example)
        assert losses[index].item() == pytest.approx(loss, rel=1e-5)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            difference = (found[name][index].view_as(gradient) - gradient).norm()
            assert difference <= 1e-5 * gradient.norm(), (example.row, name)


def test_layers_of_every_kind_give_the_same_gradients_fused_or_not(rows):
    """A bias, a transposed weight (left unfused), an rslora scale, an adapter on the output head."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=49152,
        )
    )
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=49152, n_positions=128))
    for base, targets, merges in (
        (qwen, ["q_proj", "down_proj", "lm_head"], [True, True, True]),
        (gpt, ["c_attn", "c_proj"], [False, False, False]),
    ):
        nn_bias = [parameter for name, parameter in base.named_parameters() if name.endswith("bias")]
        assert nn_bias
        for bias in nn_bias:
            torch.nn.init.normal_(bias)
        lora = LoraConfig(target_modules=targets, r=3, use_rslora=True, task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, lora)
        assert [can_fuse(pair) for pair in lora_pairs(model)] == merges
        oracle = [autograd_gradients(model, row)[0] for row in rows]
        for fused in (True, False):
            found, _ = batched_gradients(model, rows, fused)
            for name, gradients in found.items():
                for gradient, wanted in zip(gradients, oracle, strict=True):
                    assert (gradient - wanted[name].flatten()).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.fixture
def oracle(lora_model, rows) -> list[dict[str, torch.Tensor]]:
    """Each row's gradients by autograd, of the model as a test has changed it: call it after the change."""
    return lambda: [autograd_gradients(lora_model, row)[0] for row in rows]


def assert_gradients(found: dict[str, torch.Tensor], wanted: list[dict[str, torch.Tensor]]) -> None:
    for index, gradients in enumerate(wanted):
        for name, gradient in gradients.items():
            assert (found[name][index] - gradient.flatten()).norm() <= 1e-5 * gradient.norm() + 1e-9, (index, name)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", ["rows and tokens in one", "heads apart"])
def test_tokens_in_their_order_are_told_apart_whatever_their_shape(lora_model, rows, oracle, fused, shape):
    """As OPT, and the shared expert of a mixture, are given them; or with an axis more."""
    layer = lora_model.base_model.model.model.layers[1].mlp
    through = layer.forward
    if shape == "rows and tokens in one":
        layer.forward = lambda x: through(x.flatten(0, 1)).view_as(x)
    else:
        layer.forward = lambda x: through(x[:, :, None]).squeeze(2)
    assert_gradients(batched_gradients(lora_model, rows, fused)[0], oracle())


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_used_more_than_once_has_the_sum(lora_model, rows, oracle, fused):
    layers = lora_model.base_model.model.model.layers
    layers[1] = layers[0]
    assert_gradients(batched_gradients(lora_model, rows, fused)[0], oracle())


def as_an_expert(lora_model: torch.nn.Module) -> None:
    """Give a layer some tokens of all rows in an order of their own, as an expert of a mixture is given them."""
    layer = lora_model.base_model.model.model.layers[1].mlp
    through = layer.forward

    def routed(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = (flat[:, 0] > flat[:, 0].median()).nonzero()[:, 0].flip(0)
        return torch.zeros_like(flat).index_copy(0, chosen, through(flat[chosen])).view_as(x)

    layer.forward = routed


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_that_is_not_told_which_token_is_whose_is_refused(lora_model, rows, fused):
    as_an_expert(lora_model)
    with pytest.raises(TokensMixed, match=r"mlp\.\w+_proj is given tokens of all rows at once, \[225, "):
        batched_gradients(lora_model, rows, fused)


def test_such_a_model_runs_one_row_at_a_time(lora_model, rows):
    """Within a row all tokens are the row's own, so its median, and what the layer is given, are too."""
    as_an_expert(lora_model)
    capture = make_capture(lora_model, torch.float32, 0, 10_000)
    batches = batches_of(capture, rows, capture.parameters)
    assert batches == [[0], [3], [4], [1], [2]]
    for done in project_rows(capture, rows, batches, lambda slot, g: g, Identity(capture.parameters)):
        wanted = autograd_gradients(lora_model, rows[done.indices[0]])[0]
        flat = torch.cat([wanted[slot.name].flatten() for slot in capture.slots])
        assert (done.vectors[0] - flat).norm() <= 1e-5 * flat.norm()


def test_a_row_does_not_feel_its_neighbours(lora_model, rows):
    together, _ = batched_gradients(lora_model, rows)
    alone, _ = batched_gradients(lora_model, rows[1:2])
    for name, gradient in alone.items():
        assert (together[name][1] - gradient[0]).norm() <= 1e-5 * gradient[0].norm(), name


def test_the_loss_alone_needs_no_backward(lora_model, rows):
    capture = make_capture(lora_model, torch.float32, 0, 128)
    losses = [autograd_gradients(lora_model, example)[1] for example in rows]
    assert mean_loss(capture, rows) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def snapshot(model: torch.nn.Module) -> tuple:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [
            (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for module in model.modules()
        ],
        torch.get_rng_state(),
    )


def assert_same(before: tuple, after: tuple) -> None:
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert before[2] == after[2]
    for one, other in zip(before[3], after[3], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert before[4] == after[4]
    assert torch.equal(before[5], after[5])


def test_a_pass_leaves_the_model_bit_identical(lora_model, rows):
    lora_model(input_ids=torch.tensor([rows[2].input_ids]), labels=torch.tensor([rows[2].labels])).loss.backward()
    lora_model.base_model.model.model.layers[0].eval()  # a mode of its own must survive, too
    before = snapshot(lora_model)
    capture = make_capture(lora_model, torch.float32, 0, 128)
    batches = [[0], [1, 2, 3], [4]]
    for _ in project_rows(capture, rows, batches, lambda slot, gradient: gradient, Identity(capture.parameters)):
        assert_same(before, snapshot(lora_model))
    assert_same(before, snapshot(lora_model))


def test_the_model_is_restored_when_the_pass_fails(lora_model, rows):
    before = snapshot(lora_model)

    def fails(slot, gradient):
        raise RuntimeError("inside the hook")

    capture = make_capture(lora_model, torch.float32, 0, 128)
    with pytest.raises(RuntimeError, match="inside the hook"):
        list(project_rows(capture, rows, [[0, 1]], fails, Identity(capture.parameters)))
    assert_same(before, snapshot(lora_model))


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "not finite"), (0.0, "all zero")])
def test_a_bad_gradient_names_its_row(lora_model, rows, factor, words):
    capture = make_capture(lora_model, torch.float32, 0, 128)

    def spoil(slot, gradient):
        gradient[1] *= factor  # the second row of the batch
        return gradient

    with pytest.raises(DataflexError, match=f"row 3 of made: its gradient is {words}"):
        list(project_rows(capture, rows, [[0, 3]], spoil, Identity(capture.parameters)))


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_parameters_get_no_gradient_and_nothing_below_the_first_pair_is_differentiated(lora_model, rows, fused):
    seen = []
    embedding = lora_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    batched_gradients(lora_model, rows, fused)
    handle.remove()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in lora_model.parameters())


def test_float16_is_refused(lora_model):
    with pytest.raises(UsageError, match="underflow in float16; use bf16"):
        make_capture(lora_model, torch.float16, 0, 128)


def test_row_losses_match_without_lora(lora_model, rows):
    batch = collate(rows, pad_token_id=0)
    with undisturbed(lora_model), torch.no_grad():
        losses = row_losses(lora_model, batch["input_ids"], batch["labels"], whole_losses)
    assert losses.tokens.tolist() == [50, 1, 3, 40, 32]  # the first token of a row is never predicted


OUT_OF_MEMORY = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from made_rows import row
from dataflex import load_config
from dataflex.gradients.capture import make_capture
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.model import add_lora, load_base_model
from dataflex.projection.table import make_projector

class Said:
    lines = []
    def say(self, text): self.lines.append(text)
    def task(self, *args): return SILENT.task(*args)

from dataflex.progress import SILENT
config = load_config(options={{"model_name_or_path": {model!r}, "lora_rank": 4}})
base = load_base_model(config, torch.float32)
base.resize_token_embeddings(49152)  # logits that take room
model = add_lora(base, config)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.05)
rows = [row(number, 500 - number, list(range({first}, 500 - number))) for number in range(24)]

def vectors(budget):
    capture = make_capture(model, torch.float32, 0, budget)
    projector = make_projector("sketch", capture.parameters, 64, 1, "cpu")
    out = torch.zeros(len(rows), 64)
    for done in project_rows(capture, rows, batches_of(capture, rows, 64), lambda slot, g: g, projector, Said()):
        out[done.indices] = done.vectors
    return out

wanted = vectors(1000)
assert not Said.lines
status = Path("/proc/self/status").read_text()
size = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + {room}, size + {room}))
found = vectors(12000)
print(len(Said.lines), Said.lines[0], float((found - wanted).norm() / wanted.norm()))
"""


def test_a_batch_that_does_not_fit_is_taken_in_halves(tiny_model_dir, tmp_path):
    """The address space is made too small for the batch: torch's own allocation fails."""
    script = OUT_OF_MEMORY.format(
        tests=str(Path(__file__).parent), model=str(tiny_model_dir), first=470, room=120 << 20
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, *words, difference = done.stdout.split()
    assert int(said) >= 1
    assert " ".join(words[:8]) == "out of memory over 12000 tokens; going on"
    assert float(difference) < 1e-5


def test_a_row_that_does_not_fit_is_named(tiny_model_dir):
    script = OUT_OF_MEMORY.format(tests=str(Path(__file__).parent), model=str(tiny_model_dir), first=0, room=4 << 20)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (
        "DataflexError: out of memory over 500 tokens (row 0 of made is the longest); lower cutoff_len" in done.stderr
    )
