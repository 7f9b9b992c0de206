"""What `candidates`, `prefilter` and `grad_layers` save, and how many of the full run's picks they find.

    .venv/bin/python examples/evidence/candidates.py --rows 75 --seeds 1 2 3 --target alpaca_en_demo

A pool of --rows rows of each of four kinds of real rows, 10 others of one kind as the target; SmolLM2-135M-Instruct,
LoRA rank 16, template qwen. One round of 4 warm-up steps and three selections, each trained on for 4 steps of 4 rows.
Each way is a run of its own, begun alike; a run that is done is read from --folder. Prints for each way the seconds of
all selections against the full run's, and the share of the full run's picks that the second and third selections found.
The line "first picks kept" is the share that the first selection's picks alone find: 1.00 says that nothing changed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

import dataflex

LIBRARY = Path(__file__).resolve().parent.parent.parent
KINDS = ["alpaca_en_demo", "alpaca_zh_demo", "identity", "glaive_toolcall_en_demo"]
WAYS: dict[str, dict[str, object]] = {
    "all rows": {},
    "candidates 0.2": {"candidates": 0.2},
    "candidates 0.4": {"candidates": 0.4},
    "candidates 0.6": {"candidates": 0.6},
    "candidates 0.4, prefilter bm25": {"candidates": 0.4, "prefilter": "bm25"},
    "candidates 0.4, prefilter rds": {"candidates": 0.4, "prefilter": "rds"},
    "layers 15-29": {"grad_layers": "15-29"},
    "candidates 0.4, layers 15-29": {"candidates": 0.4, "grad_layers": "15-29"},
}
STEPS = (4, 8, 12)
TARGET_ROWS = 10
TARGET = "target"  # the target's name in the dataset_info.json of a run


def write_pool(folder: Path, rows: int, target: str, seed: int) -> None:
    """Rows of each kind drawn anew, ten others of the target's kind, and the dataset_info.json that names them."""
    source = json.loads((LIBRARY / "data/dataset_info.json").read_text(encoding="utf-8"))
    info = {}
    for name in KINDS:
        records = json.loads((LIBRARY / "data" / source[name]["file_name"]).read_text(encoding="utf-8"))
        random.Random(f"{seed} {name}").shuffle(records)
        held_out = TARGET_ROWS if name == target else 0
        for dataset, drawn in (
            (name, records[held_out : held_out + rows]),
            *([(TARGET, records[:held_out])] if held_out else []),
        ):
            info[dataset] = {**source[name], "file_name": f"{dataset}.json"}
            (folder / f"{dataset}.json").write_text(json.dumps(drawn, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def run(folder: Path, way: str, seed: int, arguments: argparse.Namespace) -> tuple[float, list[set[int]]]:
    """The seconds of all selections of a run, and the rows of each."""
    output = folder / way.replace(" ", "-").replace(",", "")
    config = dataflex.load_config(
        options={
            "model_name_or_path": str(LIBRARY / "models/SmolLM2-135M-Instruct"),
            "template": "qwen",
            "cutoff_len": arguments.cutoff_len,
            "lora_rank": 16,
            "dataset_dir": str(folder),
            "dataset": KINDS,
            "eval_dataset": TARGET,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-4,
            "num_train_epochs": 1.0,
            "warmup_step": 4,
            "update_step": 4,
            "update_times": 3,
            "disable_gradient_checkpointing": True,
            "token_budget": 1024,
            "seed": seed,
            "output_dir": str(output),
            **WAYS[way],
        }
    )
    dataflex.dynamic(config)
    seconds = json.loads((output / "run.json").read_text(encoding="utf-8"))["seconds"]["selection"]
    files = [output / "selections" / f"step-{step}.jsonl" for step in STEPS]
    return seconds, [
        {json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines()} for path in files
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75, help="of each kind")
    parser.add_argument("--target", choices=KINDS, default=KINDS[-1])
    parser.add_argument("--cutoff-len", type=int, default=192)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside all rows")
    parser.add_argument("--folder", type=Path, default=Path("saves/evidence/candidates"))
    arguments = parser.parse_args()
    ways = list(dict.fromkeys(["all rows", *arguments.ways]))
    times: dict[str, list[float]] = {way: [] for way in ways}
    shares: dict[str, list[float]] = {way: [] for way in ways}
    kept: list[float] = []
    for seed in arguments.seeds:
        folder = arguments.folder / f"{arguments.target}-rows-{arguments.rows}-seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        write_pool(folder, arguments.rows, arguments.target, seed)
        full: tuple[float, list[set[int]]] | None = None
        for way in ways:
            found = run(folder, way, seed, arguments)
            full = full or found
            if found is full:
                kept.append(float(np.mean([len(full[1][0] & later) / len(later) for later in full[1][1:]])))
            times[way].append(found[0] / full[0])
            later = zip(found[1][1:], full[1][1:], strict=True)
            shares[way].append(float(np.mean([len(mine & theirs) / len(theirs) for mine, theirs in later])))
    print("| way | selections, of the full run's time | of its picks, from the second selection on |\n|---|---|---|")
    print(f"| first picks kept | | {np.mean(kept):.2f} ({', '.join(f'{share:.2f}' for share in kept)}) |")
    for way in ways:
        by_seed = ", ".join(f"{share:.2f}" for share in shares[way])
        print(f"| {way} | {np.mean(times[way]):.2f} | {np.mean(shares[way]):.2f} ({by_seed}) |")


if __name__ == "__main__":
    main()
