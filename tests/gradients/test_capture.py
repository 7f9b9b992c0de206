"""Batched per-row gradients against plain autograd on a batch of one."""

from __future__ import annotations

import pytest
import torch

from dataflex.data.batches import collate
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.capture import adapter_values, row_gradients, row_losses, undisturbed
from dataflex.gradients.passes import make_pass, mean_loss, project_rows
from dataflex.gradients.projection import Identity
from dataflex.lora import layout, lora_pairs


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


def batched_gradients(model: torch.nn.Module, rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
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
        )
    return found, losses.loss


def test_a_padded_batch_gives_each_row_its_own_gradient(lora_model, rows):
    found, losses = batched_gradients(lora_model, rows)
    for index, example in enumerate(rows):
        wanted, loss = autograd_gradients(lora_model, example)
        assert losses[index].item() == pytest.approx(loss, rel=1e-5)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            difference = (found[name][index].view_as(gradient) - gradient).norm()
            assert difference <= 1e-5 * gradient.norm(), (example.row, name)


def test_a_row_does_not_feel_its_neighbours(lora_model, rows):
    together, _ = batched_gradients(lora_model, rows)
    alone, _ = batched_gradients(lora_model, rows[1:2])
    for name, gradient in alone.items():
        assert (together[name][1] - gradient[0]).norm() <= 1e-5 * gradient[0].norm(), name


def test_the_loss_alone_needs_no_backward(lora_model, rows):
    run = make_pass(lora_model, torch.float32, 0, 128)
    losses = [autograd_gradients(lora_model, example)[1] for example in rows]
    assert mean_loss(run, rows) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def snapshot(model: torch.nn.Module) -> tuple:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
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
    run = make_pass(lora_model, torch.float32, 0, 128)
    batches = [[0], [1, 2, 3], [4]]
    for _ in project_rows(run, rows, batches, lambda slot, gradient: gradient, Identity(run.parameters)):
        assert_same(before, snapshot(lora_model))
    assert_same(before, snapshot(lora_model))


def test_the_model_is_restored_when_the_pass_fails(lora_model, rows):
    before = snapshot(lora_model)

    def fails(slot, gradient):
        raise RuntimeError("inside the hook")

    run = make_pass(lora_model, torch.float32, 0, 128)
    with pytest.raises(RuntimeError, match="inside the hook"):
        list(project_rows(run, rows, [[0, 1]], fails, Identity(run.parameters)))
    assert_same(before, snapshot(lora_model))


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "not finite"), (0.0, "all zero")])
def test_a_bad_gradient_names_its_row(lora_model, rows, factor, words):
    run = make_pass(lora_model, torch.float32, 0, 128)

    def spoil(slot, gradient):
        gradient[1] *= factor  # the second row of the batch
        return gradient

    with pytest.raises(DataflexError, match=f"row 3 of made: its gradient is {words}"):
        list(project_rows(run, rows, [[0, 3]], spoil, Identity(run.parameters)))


def test_frozen_parameters_get_no_gradient_and_nothing_below_the_first_pair_is_differentiated(lora_model, rows):
    seen = []
    embedding = lora_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    batched_gradients(lora_model, rows)
    handle.remove()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in lora_model.parameters())


def test_float16_is_refused(lora_model):
    with pytest.raises(UsageError, match="underflow in float16; use bf16"):
        make_pass(lora_model, torch.float16, 0, 128)


def test_row_losses_match_without_lora(lora_model, rows):
    batch = collate(rows, pad_token_id=0)
    with undisturbed(lora_model), torch.no_grad():
        losses = row_losses(lora_model, batch["input_ids"], batch["labels"])
    assert losses.tokens.tolist() == [50, 1, 3, 40, 32]  # the first token of a row is never predicted
