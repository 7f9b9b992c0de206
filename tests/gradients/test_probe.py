"""Which rows may share a batch, and what is refused before anything is written."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_rows import row
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from dataflex import load_config
from dataflex.errors import UsageError
from dataflex.gradients.capture import make_capture
from dataflex.gradients.forward_state import ForwardState, undisturbed
from dataflex.gradients.passes import batches_of, mean_loss, project_rows
from dataflex.gradients.probe import check_capture, check_gradients, groups_of, length_ranges
from dataflex.lora import lora_pairs
from dataflex.model import add_lora
from dataflex.projection.identity import Identity

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + index for index in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 64.0,
}
LENGTHS = [53, 96, 64, 70, 60, 65, 88]


def adapted(base: nn.Module) -> nn.Module:
    model = add_lora(base.float(), load_config(options={"lora_rank": 4}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.weight_b.copy_(torch.randn(pair.weight_b.shape, generator=generator) * 0.05)
    return model


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "longrope":
        config = Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=LONGROPE)
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return adapted(model)


def examples(lengths: list[int]) -> list:
    return [row(number, length, list(range(1, length))) for number, length in enumerate(lengths)]


def alone(model: nn.Module, example) -> tuple[torch.Tensor, float]:
    """The oracle: one row through a copy of a model that has run nothing."""
    fresh = copy.deepcopy(model).eval()
    loss = fresh(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
    loss.backward()
    return torch.cat([g.flatten() for p in lora_pairs(fresh) for g in (p.weight_a.grad, p.weight_b.grad)]), loss.item()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("ran_before", [[], [400]], ids=["fresh", "after a long row"])
def test_a_row_has_the_numbers_it_has_alone(kind, ran_before):
    model, rows = make(kind), examples(LENGTHS)
    wanted, losses = zip(*[alone(model, example) for example in rows], strict=True)
    capture = make_capture(model, torch.float32, 0, 10_000)
    for length in ran_before:  # as training does between two selections
        model(input_ids=torch.randint(3, 2000, (1, length)))
    batches = batches_of(capture, rows, capture.parameters)
    assert max(map(len, batches)) > 1
    for done in project_rows(capture, rows, batches, lambda slot, gradient: gradient, Identity(capture.parameters)):
        for index, vector in zip(done.indices, done.vectors, strict=True):
            assert (vector - wanted[index]).norm() <= 1e-4 * wanted[index].norm(), LENGTHS[index]
    assert mean_loss(capture, rows) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_batches_do_not_cross_a_switch_and_past_three_switches_a_batch_has_one_length():
    lengths = [*LENGTHS, 88]

    def groups(kind: str) -> list[list[int]]:
        found = groups_of(make_capture(make(kind), torch.float32, 0, 10_000), examples(lengths))
        assert sorted(index for group in found for index in group) == list(range(len(lengths)))
        return [sorted(lengths[index] for index in group) for group in found]

    assert groups("longrope") == [[65, 70, 88, 88, 96], [53, 60, 64]]
    assert groups("dynamic") == [[96], [88, 88], [70], [65], [53, 60, 64]]


@pytest.mark.parametrize("switches", [[], [3], [1, 2], [5, 8], [2, 4, 6], list(range(12))])
def test_ranges_are_those_of_the_switches(switches):
    """Against all pairs: two lengths share a range if and only if no switch lies between, up to three switches."""
    lengths = [1, 2, 3, 4, 5, 6, 7, 9]
    level = {length: sum(length > switch for switch in switches) for length in lengths}
    found = length_ranges(lengths, lambda short, long: level[short] == level[long])
    assert [length for group in found for length in group] == lengths
    assert all(len({level[length] for length in group}) == 1 for group in found)
    if len(switches) <= 3:
        assert len(found) == len(set(level.values()))


def test_the_groups_are_the_same_whatever_ran_before():
    rows = examples(LENGTHS)
    model = make("dynamic")
    capture = make_capture(model, torch.float32, 0, 10_000)
    first = groups_of(capture, rows)
    model(input_ids=torch.randint(3, 2000, (1, 300)))
    assert groups_of(capture, rows) == first


def test_a_common_model_shares_all_batches(lora_model, rows):
    assert groups_of(make_capture(lora_model, torch.float32, 0, 128), rows) == [list(range(len(rows)))]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_to_compare(lora_model, rows, count):
    assert groups_of(make_capture(lora_model, torch.float32, 0, 128), rows[:count]) == [list(range(count))]


class TestState:
    def test_buffers_and_the_values_beside_them_come_back(self):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        norm = model[0]
        norm.seen = 3
        state = ForwardState(model)
        kept = norm.running_mean
        norm.running_mean.add_(1)
        norm.running_var = torch.zeros(2)
        norm.seen = 4
        assert not state.is_like(ForwardState(model))
        state.restore()
        assert norm.running_mean is kept and norm.seen == 3
        assert torch.equal(norm.running_mean, torch.zeros(2)) and torch.equal(norm.running_var, torch.ones(2))
        assert state.is_like(ForwardState(model))

    def test_a_moved_model_stays_where_it_is(self):
        model = nn.BatchNorm1d(2)
        state = ForwardState(model)
        model.double().running_mean.add_(1)
        state.restore()
        assert model.running_mean.dtype == torch.float64 and model.running_mean.tolist() == [0, 0]

    @pytest.mark.parametrize("kind", ["longrope", "dynamic"])
    def test_a_pass_leaves_the_buffers_of_training_as_they_were(self, kind):
        model = make(kind)
        capture = make_capture(model, torch.float32, 0, 10_000)
        model(input_ids=torch.randint(3, 2000, (1, 300)))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        rows = examples([20, 80])
        for _ in project_rows(capture, rows, [[0], [1]], lambda slot, g: g, Identity(capture.parameters)):
            assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    def test_a_model_that_fails_leaves_them_as_well(self):
        model = make("dynamic")
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with pytest.raises(ZeroDivisionError), undisturbed(model), torch.no_grad():
            model(input_ids=torch.randint(3, 2000, (1, 300)))
            raise ZeroDivisionError
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class TestRefusals:
    def check(self, model: nn.Module, rows: list) -> None:
        check_gradients(model, torch.float32, 0, rows)

    def test_nothing_is_wrong_with_a_common_model(self, lora_model, rows):
        before = {name: value.clone() for name, value in lora_model.state_dict().items()}
        state = torch.get_rng_state()
        self.check(lora_model, rows)
        assert all(torch.equal(value, before[name]) for name, value in lora_model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in lora_model.parameters())

    def test_a_float16_model_is_tried_in_bfloat16(self, lora_model, rows):
        check_gradients(lora_model, torch.float16, 0, rows)

    def test_a_layer_that_is_never_called(self, lora_model, rows):
        """As a kernel does that reads the weight itself."""
        for layer in lora_model.base_model.model.model.layers:
            projection = layer.mlp.up_proj
            layer.mlp.up_proj = nn.Identity()
            layer.mlp.forward = lambda x, mlp=layer.mlp, weight=projection.weight: mlp.down_proj(
                mlp.act_fn(mlp.gate_proj(x)) * (x @ weight.T)
            )
            layer.mlp.kernel = projection
        for name, module in list(lora_model.named_modules()):
            assert not name.endswith("up_proj") or isinstance(module, nn.Identity)
        with pytest.raises(UsageError, match="lora_target: kernel is never called in a forward pass"):
            self.check(lora_model, rows)

    def test_a_model_that_remembers_rows(self, lora_model, rows):
        embedding = lora_model.get_input_embeddings()
        seen = []
        embedding.register_forward_hook(lambda module, args, out: seen.append(1) or out * (1 + 0.1 * len(seen)))
        with pytest.raises(UsageError, match="row 2 of made: its loss depends on the rows that ran before it"):
            self.check(lora_model, rows)

    def test_a_gradient_that_is_not_autograds(self, lora_model, rows):
        layer = lora_model.base_model.model.model.layers[0].mlp.up_proj
        scaling = dict(layer.scaling)
        capture = make_capture(lora_model, torch.float32, 0, 128)
        layer.scaling = {name: 3 * value for name, value in scaling.items()}  # as code that scales in a way of its own
        with pytest.raises(UsageError, match="row 2 of made: its gradient differs from autograd's by"):
            check_capture(capture, rows)

    def test_a_row_that_feels_its_neighbours_runs_alone(self, lora_model, rows):
        said = SimpleNamespace(lines=[])
        said.say = said.lines.append
        embedding = lora_model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: out + 0.1 * out.mean(dim=(0, 1)).detach() * len(out))
        same = [*rows, row(9, 33, list(range(33)))]
        check_gradients(lora_model, torch.float32, 0, same, said)
        assert said.lines == ["rows run one at a time: layers of this model mix the tokens of a batch"]

    @pytest.mark.parametrize("command", ["warmup", "train", "dynamic"])
    def test_nothing_is_written(self, tiny_run, tmp_path: Path, command: str):
        import dataflex

        config = load_config(
            options={**tiny_run, "max_steps": 2, "lora_target": "embed_tokens", "output_dir": str(tmp_path / "out")}
        )
        with pytest.raises(UsageError, match="'embed_tokens' is no linear layer"):
            getattr(dataflex, command)(config)
        assert not (tmp_path / "out").exists()
