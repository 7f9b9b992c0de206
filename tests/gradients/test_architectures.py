"""ARCHITECTURES.md, and each architecture's gradients against autograd on one row of a model that has run nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from architectures import HEADER, SHAPES, adapt, judge, make_base, make_rows, table_line

from dataflex import load_config
from dataflex.data.examples import Example
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.passes import batches_of, mean_loss, project_rows
from dataflex.lora import layout, lora_pairs
from dataflex.model import load_adapter
from dataflex.projection.identity import Identity


def alone(model: torch.nn.Module, row: Example) -> tuple[torch.Tensor, float]:
    """The oracle: transformers' own loss on one row of a copy of `model`, which has run nothing, and autograd's flat
    gradient."""
    fresh = copy.deepcopy(model).eval()
    loss = fresh(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]), use_cache=False).loss
    loss.backward()
    slots = layout(lora_pairs(fresh))
    gradients = [torch.zeros(slot.size) if slot.parameter.grad is None else slot.parameter.grad for slot in slots]
    return torch.cat([gradient.flatten() for gradient in gradients]), loss.item()


def together(capture: Capture, rows: list[Example]) -> torch.Tensor:
    """[rows, P], each row's gradient from batches of several."""
    batches = batches_of(capture, rows, capture.parameters)
    found = torch.zeros(len(rows), capture.parameters)
    for done in project_rows(capture, rows, batches, lambda slot, gradient: gradient, Identity(capture.parameters)):
        found[done.indices] = done.vectors
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_an_architecture(name: str, repo: Path, tmp_path: Path):
    verdict = judge(name)
    assert table_line(name, verdict) in (repo / "ARCHITECTURES.md").read_text().splitlines()

    pristine, rows = adapt(make_base(name), verdict.target), make_rows()
    wanted, losses = zip(*[alone(pristine, row) for row in rows], strict=True)
    capture = make_capture(verdict.model, torch.float32, 0, token_budget=96)
    for row, gradient, expected in zip(rows, together(capture, rows), wanted, strict=True):
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 3e-4 * expected.norm(), row.row
    assert mean_loss(capture, rows) == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)

    # the checkpoint that training would write is one that gradients can be taken at
    verdict.model.save_pretrained(tmp_path)
    reloaded = load_adapter(make_base(name), tmp_path, load_config())
    again = make_capture(reloaded, torch.float32, 0, token_budget=96)
    assert [slot.name for slot in again.slots] == [slot.name for slot in capture.slots]
    torch.testing.assert_close(together(again, rows[:1])[0], wanted[0], rtol=1e-3, atol=1e-3 * wanted[0].abs().max())


def test_the_table_holds_every_architecture_and_no_more(repo: Path):
    text = (repo / "ARCHITECTURES.md").read_text()
    assert text.startswith(HEADER)
    assert [line.split(" | ")[0].removeprefix("| ") for line in text[len(HEADER) :].splitlines()[1:]] == list(SHAPES)
    assert len(SHAPES) >= 30
