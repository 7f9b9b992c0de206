"""Ours: the Adam direction of each row, sketched; or with --batch a projection of ready-made directions alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from shared import Clock, Inputs, Row, batch_of_directions, load_model, read_inputs, repeated, report

from dataflex.data.examples import Example
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.direction import Direction, make_direction
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.projection.protocol import Projector
from dataflex.projection.table import make_projector
from dataflex.training.moments import load_moments


def examples_of(rows: list[Row]) -> list[Example]:
    return [Example(index, row["input_ids"], row["labels"], None, "rows.jsonl") for index, row in enumerate(rows)]


def capture_of(inputs: Inputs) -> Capture:
    return make_capture(load_model(inputs), torch.float32, inputs.pad_token_id, inputs.token_budget)


def direction_of(capture: Capture, inputs: Inputs, gradient_type: str = "adam", formula: str = "torch") -> Direction:
    return make_direction(gradient_type, formula, load_moments(Path(inputs.checkpoint)), capture.slots)


def project(capture: Capture, rows: list[Row], direction: Direction, projector: Projector) -> torch.Tensor:
    """[rows, k] in the order of `rows`."""
    examples = examples_of(rows)
    batches = batches_of(capture, examples, projector.dim)
    vectors = torch.empty(len(rows), projector.dim)
    for done in project_rows(capture, examples, batches, direction, projector):
        vectors[done.indices] = done.vectors
    return vectors


def measure_gradients(folder: Path, name: str, dim: int) -> None:
    inputs, rows = read_inputs(folder)
    capture, clock = capture_of(inputs), Clock()
    direction = clock.timed("direction", direction_of(capture, inputs))
    projector = make_projector(name, capture.parameters, dim, 0, "cpu")
    projector.add = clock.timed("projection", projector.add)
    project(capture, rows[-1:], direction, projector)
    clock.seconds.clear()
    with clock.part("all"):
        project(capture, rows, direction, projector)
    seconds = clock.seconds.pop("all")
    parts = {"forward and backward": seconds - sum(clock.seconds.values()), **clock.seconds}
    batches = len(batches_of(capture, examples_of(rows), dim))
    note = f"{capture.parameters:,} LoRA parameters; batches of at most {capture.token_budget} tokens: {batches}"
    report("dataflex", len(rows), sum(len(row["input_ids"]) for row in rows), seconds, parts, note)


def measure_projection(folder: Path, name: str, dim: int, batch: int) -> None:
    values, setup = batch_of_directions(folder, batch), Clock()
    with setup.part("once"):
        projector = make_projector(name, values.shape[1], dim, 0, "cpu")
    projector.add(torch.zeros(1, dim), 0, values[:1, : 1 << 16].clone())
    rows, clock = repeated(values, lambda copy: projector.add(torch.zeros(batch, dim), 0, copy))
    note = f"batches of {batch}; {setup.seconds['once']:.2f} s of set-up, once a run, not counted"
    report("dataflex", rows, 0, clock.seconds["projection"], clock.seconds, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shared inputs, as peers.py writes them")
    parser.add_argument("--projector", default="sketch", choices=["sketch", "rademacher"])
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--batch", type=int, help="project so many ready-made directions at a time, nothing else")
    args = parser.parse_args()
    if args.batch:
        measure_projection(args.folder, args.projector, args.dim, args.batch)
    else:
        measure_gradients(args.folder, args.projector, args.dim)


if __name__ == "__main__":
    main()
