"""TRAK: its projector for the CPU, on ready-made directions as wide as the adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import Clock, batch_of_directions, repeated, report
from trak.projectors import BasicProjector, ProjectionType


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shared inputs, as peers.py writes them")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="rows projected at a time")
    args = parser.parse_args()

    values, setup = batch_of_directions(args.folder, args.batch), Clock()
    with setup.part("once"):  # also the warm-up: it draws a block of the matrix, and draws it anew in each projection
        projector = BasicProjector(
            grad_dim=values.shape[1],
            proj_dim=args.dim,
            seed=0,
            proj_type=ProjectionType.rademacher,
            device="cpu",
        )
    rows, clock = repeated(values, lambda copy: projector.project(copy, model_id=0))
    note = f"batches of {args.batch}; {setup.seconds['once']:.2f} s of set-up, once a run, not counted"
    report("traker", rows, 0, clock.seconds["projection"], clock.seconds, note)


if __name__ == "__main__":
    main()
