"""Bergson: what `bergson build` does with the adapter, called from Python so that loading is not timed.

It takes the gradients in batches by tokens, as ours does, but projects each LoRA matrix by itself, to 16 × 16
numbers with a random matrix on either side. It has no LESS direction: gradients stay as they are, or with --adam
are divided by the root of Adam's second moments, which makes it form and project every row's full gradient.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bergson import IndexConfig, collect_gradients, load_gradients
from bergson.config import DistributedConfig
from bergson.data import allocate_batches
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset
from safetensors.torch import load_file
from shared import Row, cosine, read_inputs, read_vectors, report


def second_moments(checkpoint: str, folder: str) -> str:
    """Adam's second moments as Bergson reads them: by name, for it cannot map the two parameter groups (one of them
    empty) of transformers' optimizer.pt onto an adapter."""
    moments = load_file(Path(checkpoint) / "moments.safetensors")
    names = [name.removeprefix("exp_avg_sq/") for name in moments if name.startswith("exp_avg_sq/")]
    state = {
        index: {"param_name": name, "exp_avg_sq": moments[f"exp_avg_sq/{name}"]} for index, name in enumerate(names)
    }
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, f"{folder}/optimizer.pt")
    return f"{folder}/optimizer.pt"


def build(config: IndexConfig, model: torch.nn.Module, modules: set[str] | None, rows: list[Row]) -> float:
    """Write the index of `rows`; return the seconds that took, without setting up."""
    config.partial_run_path.mkdir()
    lengths = [len(row["input_ids"]) for row in rows]
    data = Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [row["labels"] for row in rows],
            "length": lengths,
        }
    )
    processor = create_processor(model, config, modules)
    batches = allocate_batches(lengths, config.token_batch_size)
    started = time.perf_counter()
    collect_gradients(model, data, processor, config, batches=batches, target_modules=modules)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shared inputs, as peers.py writes them")
    parser.add_argument("--adam", action="store_true", help="divide by the root of Adam's second moments")
    parser.add_argument("--dim", type=int, default=16, help="each matrix becomes dim × dim numbers")
    args = parser.parse_args()

    inputs, rows = read_inputs(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(
            run_path=f"{folder}/index",
            model=inputs.checkpoint,
            precision="fp32",
            projection_dim=args.dim,
            token_batch_size=inputs.token_budget,
            loss_reduction="mean",  # as training has it; its default is the sum over tokens
            optimizer_state=second_moments(inputs.checkpoint, folder) if args.adam else "",
            distributed=DistributedConfig(nproc_per_node=1),
        )
        model, modules = setup_model_and_peft(config)
        plain = replace(config, run_path=f"{folder}/plain", projection_dim=0, optimizer_state="")
        build(plain, model, modules, rows[:1])
        theirs = torch.from_numpy(load_gradients(plain.partial_run_path)[0].copy())
        agreement = cosine(theirs, read_vectors(args.folder)["gradient"])
        build(replace(config, run_path=f"{folder}/warm-up"), model, modules, rows[-1:])
        seconds = build(config, model, modules, rows)
        width = load_gradients(config.partial_run_path).shape[1]
    note = (
        f"{len(modules or ())} matrices, {width:,} numbers a row; unprojected gradient of a row: "
        f"cosine {agreement:.7f} with ours"
    )
    tokens = sum(len(row["input_ids"]) for row in rows)
    report("bergson", len(rows), tokens, seconds, {"collect_gradients": seconds}, note)


if __name__ == "__main__":
    main()
