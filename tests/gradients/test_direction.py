"""Γ against a real optimizer's step, and against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from dataflex.errors import UsageError
from dataflex.gradients.direction import adam_direction, make_direction
from dataflex.lora import Slot
from dataflex.training.moments import live_moments


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
    with pytest.raises(UsageError, match="do not fit its adapter at other"):
        make_direction("adam", "torch", moments, [Slot("other", parameter, 0, 1000)])
