"""DataFlex 1.1: the training half of what its LESS selector does when it selects, by its own methods.

That is: backward at batch size one, the Adam direction, a float16 buffer of up to `save_interval` rows, the
projection of the full buffer, a file. Its parameters are those of the components.yaml that it ships.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from shared import Clock, Inputs, Row, cosine, load_model, read_inputs, read_vectors, report, spread

from dataflex.train.selector.less_selector import LessSelector

SHIPPED = {"gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16}


class TimedSelector(LessSelector):
    """The selector as it is, with a clock on its two costly parts."""

    clock = Clock()

    def _obtain_gradients(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.clock.part("forward, backward, direction"):
            return super()._obtain_gradients(*args, **kwargs)

    def _get_trak_projector(self) -> type:
        chosen = super()._get_trak_projector()
        return type(chosen.__name__, (chosen,), {"project": self.clock.timed("projection", chosen.project)})


def batch_of_one(features: list[Row]) -> dict[str, torch.Tensor]:
    (row,) = features
    batch = {name: torch.tensor([ids]) for name, ids in row.items()}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def optimizer_state(model: torch.nn.Module, inputs: Inputs) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """What the trainer passes on as `optimizer.state`, with the moments that ours has saved by name."""
    moments = load_file(Path(inputs.checkpoint) / "moments.safetensors")
    return {
        parameter: {key: moments[f"{key}/{name.replace('.default.', '.')}"] for key in ("exp_avg", "exp_avg_sq")}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shared inputs, as peers.py writes them")
    parser.add_argument("--rows", type=int, default=4, help="how many of the rows, evenly over their lengths")
    args = parser.parse_args()

    inputs, rows = read_inputs(args.folder)
    first, rows = rows[0], [rows[index] for index in spread([len(row["input_ids"]) for row in rows], args.rows)]
    model = load_model(inputs).train()
    state = optimizer_state(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        selector = TimedSelector(rows, None, Accelerator(cpu=True), batch_of_one, folder, **SHIPPED)
        moments = selector._prepare_optimizer_state(model, state)
        theirs = selector._obtain_gradients(model, batch_of_one([first]), "adam", *moments)  # also the warm-up
        agreement = cosine(theirs, read_vectors(args.folder)["direction"][0])
        selector.clock.seconds.clear()
        with selector.clock.part("all"):
            selector._collect_and_save_projected_gradients(model, folder, rows, "adam", state)
            selector._merge_and_normalize_info(folder, len(rows))
    parts = selector.clock.seconds
    seconds = parts.pop("all")
    parts["projector, buffer, files"] = seconds - sum(parts.values())
    note = (
        f"Adam direction of a row: cosine {agreement:.7f} with ours (adam_formula: dataflex); "
        f"it projects {min(len(rows), SHIPPED['save_interval'])} rows at a time in float16, of "
        f"{SHIPPED['save_interval']} at most: fewer make a row dearer, since the matrix is drawn once for all of them"
    )
    report("dataflex", len(rows), sum(len(row["input_ids"]) for row in rows), seconds, parts, note)


if __name__ == "__main__":
    main()
