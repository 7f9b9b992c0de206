"""Γ against a real optimizer's step, and against the formulas written out in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from dataflex.errors import UsageError
from dataflex.gradients.direction import adam_direction, make_direction
from dataflex.lora import Slot
from dataflex.training.moments import AdamMoments, live_moments, load_moments, save_moments


def trained_optimizer(steps: int) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(40, 25))
    optimizer = torch.optim.AdamW([parameter], lr=3e-4, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
    for _ in range(steps):
        parameter.grad = torch.randn_like(parameter) * 10.0 ** torch.randint(-5, 1, parameter.shape)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_torch_formula_is_a_real_adamw_step(steps):
    parameter, optimizer = trained_optimizer(steps)
    slot = Slot("made", parameter, 0, parameter.numel())
    moments = live_moments(optimizer, [slot], steps, 3e-4)
    gradient = torch.randn_like(parameter) * 1e-3
    direction = make_direction("adam", "torch", moments, [slot])(slot, gradient.view(1, -1).clone())

    # in double precision, or the subtraction of nearly equal weights would drown the comparison
    theta = torch.nn.Parameter(parameter.detach().double())
    oracle = torch.optim.AdamW([theta], lr=3e-4, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
    if steps:
        state = optimizer.state[parameter]
        oracle.state[theta] = {
            "step": state["step"].clone(),
            "exp_avg": state["exp_avg"].double(),
            "exp_avg_sq": state["exp_avg_sq"].double(),
        }
    before = theta.detach().clone()
    theta.grad = gradient.double()
    oracle.step()
    step_taken = -(theta.detach() - before) / 3e-4
    torch.testing.assert_close(direction[0].double(), step_taken.flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("formula", ["torch", "dataflex", "less"])
def test_the_formulas_as_written_out(formula):
    torch.manual_seed(1)
    g, m = torch.randn(3, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    v = torch.rand(50, dtype=torch.float64)
    b1, b2, eps, step = 0.9, 0.999, 1e-3, 4
    m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    wanted = {
        "torch": (m1 / (1 - b1**5)) / ((v1 / (1 - b2**5)).sqrt() + eps),
        "dataflex": m1 / (v1.sqrt() + eps),
        "less": m1 / (v1 + eps).sqrt(),
    }[formula]
    torch.testing.assert_close(adam_direction(g, m, v, step, b1, b2, eps, formula), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("formula", ["torch", "dataflex", "less"])
@pytest.mark.parametrize("steps", [0, 7])
def test_a_marginal_direction_is_the_difference_of_two_steps(formula, steps):
    parameter, optimizer = trained_optimizer(steps)
    slot = Slot("made", parameter, 0, parameter.numel())
    moments = live_moments(optimizer, [slot], steps, 3e-4)
    gradients = torch.randn(3, 1000) * 10.0 ** torch.randint(-4, 1, (3, 1000))
    found = make_direction("adam", formula, moments, [slot], marginal=True)(slot, gradients.clone())
    m, v = (value[slot.name].double().flatten() for value in (moments.exp_avg, moments.exp_avg_sq))
    step_on = [adam_direction(g, m, v, steps, 0.9, 0.98, 1e-7, formula) for g in (gradients.double(), m[None] * 0)]
    torch.testing.assert_close(found.double(), step_on[0] - step_on[1], rtol=1e-4, atol=1e-5)


def test_the_directions_without_momentum_are_marginal_already():
    slot = Slot("made", torch.nn.Parameter(torch.zeros(3)), 0, 3)
    gradient = torch.tensor([[2.0, -0.5, 0.0]])
    for kind in ("sgd", "sign"):
        plain, marginal = (
            make_direction(kind, "torch", None, [slot], m)(slot, gradient.clone()) for m in (False, True)
        )
        assert torch.equal(plain, marginal)


def test_sgd_and_sign():
    slot = Slot("made", torch.nn.Parameter(torch.zeros(3)), 0, 3)
    gradient = torch.tensor([[2.0, -0.5, 0.0]])
    assert make_direction("sgd", "torch", None, [slot])(slot, gradient.clone()).tolist() == [[2.0, -0.5, 0.0]]
    assert make_direction("sign", "torch", None, [slot])(slot, gradient.clone()).tolist() == [[1.0, -1.0, 0.0]]


def test_adam_without_moments_says_so():
    slot = Slot("made", torch.nn.Parameter(torch.zeros(3)), 0, 3)
    with pytest.raises(UsageError, match=r"no moments\.safetensors.*gradient_type=sgd"):
        make_direction("adam", "torch", None, [slot])


def test_moments_of_another_adapter_are_refused():
    parameter, optimizer = trained_optimizer(1)
    moments = live_moments(optimizer, [Slot("made", parameter, 0, 1000)], 1, 3e-4)
    with pytest.raises(UsageError, match="does not fit its adapter at other"):
        make_direction("adam", "torch", moments, [Slot("other", parameter, 0, 1000)])


def test_each_parameters_own_steps_correct_its_bias():
    """A real AdamW one of whose parameters had no gradient for some steps."""
    torch.manual_seed(2)
    parameters = [torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
    for step in range(5):
        for number, parameter in enumerate(parameters):  # of five steps they take 5, 3 and none
            parameter.grad = torch.randn_like(parameter) if number == 0 or (number == 1 and step > 1) else None
        optimizer.step()
    slots = [Slot(f"p{n}", parameter, 30 * n, 30) for n, parameter in enumerate(parameters)]
    moments = live_moments(optimizer, slots, 5, 1e-2)
    assert moments.steps == {"p0": 5, "p1": 3, "p2": 0}
    assert moments.own_steps == {"p1": 3, "p2": 0}
    direction = make_direction("adam", "torch", moments, slots)
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for slot, old, gradient in zip(slots, before, gradients, strict=True):
        taken = -(slot.parameter.detach() - old).flatten() / 1e-2
        found = direction(slot, gradient.float().view(1, -1))[0]
        torch.testing.assert_close(found.double(), taken, rtol=1e-5, atol=1e-6)


def test_own_steps_are_written_and_read(tmp_path):
    first, second = ({name: torch.rand(2, 3) for name in ("a", "b")} for _ in range(2))
    for steps, written in (({"a": 7, "b": 7}, None), ({"a": 7, "b": 4}, {"b": 4})):
        moments = AdamMoments(first, second, steps, 7, 0.1, 0.9, 0.99, 1e-8)
        save_moments(moments, tmp_path)
        again = load_moments(tmp_path)
        assert (again.steps, again.step) == (steps, 7)
        with safe_open(tmp_path / "moments.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert metadata["step"] == "7"
        assert (json.loads(metadata["steps"]) if "steps" in metadata else None) == written
