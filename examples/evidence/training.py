"""Does training on the selected rows lower the loss on other rows of the target? Selectors against random rows.

    .venv/bin/python examples/evidence/training.py --tune                 # the learning rate, on the random arm alone
    .venv/bin/python examples/evidence/training.py --seeds 1 2 3 4 5      # the arms, by rows
    .venv/bin/python examples/evidence/training.py --seeds 1 2 3 4 5 --by tokens
    .venv/bin/python examples/evidence/training.py --seeds 1 2 3 --targets mmlu bbh gsm8k    # no kinds of the pool
    .venv/bin/python examples/evidence/training.py --seeds 1 2 3 --targets tools --deciles
    .venv/bin/python examples/evidence/training.py --seeds 2 --targets tools --again 3    # the noise of training itself

A pool of 24 rows each of general instructions in English and in Chinese, of questions about the model's identity and of
tool calls; three of these kinds are the target in turn, with 8 other rows. Each arm trains on a fifth of the pool, one
pass, two rows a step, and is measured on 24 further rows of the target's kind, which are the same for all seeds. A seed
draws another pool and another target, trains another warm-up and begins from other LoRA weights. SmolLM2-135M-Instruct,
LoRA rank 16, 96 tokens. The arm oracle takes rows of the target's own kind. The targets mmlu, bbh and gsm8k are the
examples with chains of thought that the package lm-eval has for MMLU, BIG-bench Hard and GSM8K, at 256 tokens. Of GSM8K
it has eight: four are held out, and the other four are the target of every seed. Prints the loss against random rows
with 95% intervals over seeds and held-out rows, and the share of the gap between random and oracle that is closed.
With --deciles it trains on each tenth of each ranking instead, and prints Spearman's correlation of a tenth's place
with the loss. With --again N it trains on the rows of some arms N times more, from other LoRA weights and in another
order, and prints the held-out losses. A comparison under way goes on in --folder. Each held-out row's loss is kept in
training_losses.json beside this script; what stands there is not measured again, unless with --anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import dataflex
from dataflex.comparison.arms import ALL, file_name
from dataflex.comparison.figures import decile_test, paired_difference
from dataflex.config import RunConfig
from dataflex.files import write_text
from dataflex.locks import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for oracle:Oracle

LIBRARY = Path(__file__).resolve().parent.parent.parent
KINDS = {
    "en": "alpaca_en_demo",
    "zh": "alpaca_zh_demo",
    "identity": "identity",
    "tools": "glaive_toolcall_en_demo",
}
TARGETS = ("en", "zh", "tools")
OUTSIDE = {
    "mmlu": "mmlu/flan_cot_fewshot/mmlu_*.yaml",
    "bbh": "bbh/cot_fewshot/[a-z]*.yaml",
    "gsm8k": "gsm8k/gsm8k-cot.yaml",
}
"""Targets that are no kind of the pool: where lm-eval's tasks have their examples."""
POOL, TARGET, HELD_OUT = 24, 8, 24
ORACLE = "oracle:Oracle"
SELECTORS = ["less", "less-contrast-rds", "rds", "bm25", ORACLE]
AGAIN = ["random", "less", "rds"]
RANKED = ["less", "less-contrast-rds", "rds"]
"""The rankings that are cut into tenths, beside the random one."""
KEPT = Path(__file__).with_name("training_losses.json")
"""Losses of held-out rows by kind of budget, target, seed and arm; under `deciles` mean losses after each tenth."""
RATES = [5e-4, 2e-3]
TUNED = {
    "en": 5e-4,
    "zh": 5e-4,
    "tools": 2e-3,
    "mmlu": 5e-4,
    "bbh": 2e-3,
    "gsm8k": 5e-4,
}  # by --tune: the rate at which random rows help most


def write_data(folder: Path, seed: int) -> None:
    """Of each kind a pool and a target that `seed` draws, the same held-out rows for every seed, and the
    dataset_info.json that names them."""
    source = json.loads((LIBRARY / "data/dataset_info.json").read_text(encoding="utf-8"))
    info = {}
    for kind, name in KINDS.items():
        records = json.loads((LIBRARY / "data" / source[name]["file_name"]).read_text(encoding="utf-8"))
        texts = [json.dumps(record, sort_keys=True) for record in records]  # some rows stand twice in these files
        records = [record for place, record in enumerate(records) if texts[place] not in texts[:place]]
        random.Random(0).shuffle(records)
        held_out = records[:HELD_OUT] if kind in TARGETS else []
        others = records[len(held_out) :]
        random.Random(f"{seed} {kind}").shuffle(others)
        seen = {opening_of(record) for record in held_out}  # some rows differ only further on
        others = [record for record in others if opening_of(record) not in seen]
        parts = {"held": held_out, "pool": others[:POOL], "target": others[POOL : POOL + TARGET]}
        for part, rows in parts.items():
            info[f"{part}_{kind}"] = {**source[name], "file_name": f"{part}_{kind}.json"}
            (folder / f"{part}_{kind}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for name, pattern in OUTSIDE.items():
        records = outside_records(pattern)
        random.Random(0).shuffle(records)
        held = min(HELD_OUT, len(records) // 2)
        others = records[held:]
        random.Random(f"{seed} {name}").shuffle(others)
        for part, rows in (("held", records[:held]), ("target", others[:TARGET])):
            info[f"{part}_{name}"] = {"file_name": f"{part}_{name}.json"}
            (folder / f"{part}_{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def outside_records(pattern: str) -> list[dict[str, str]]:
    """lm-eval's examples in the tasks that match `pattern`, a question and a chain of thought each."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.submodule_search_locations is None:
        return []
    samples = [
        sample
        for path in sorted((Path(package.submodule_search_locations[0]) / "tasks").glob(pattern))
        for sample in yaml.safe_load(path.read_text(encoding="utf-8")).get("fewshot_config", {}).get("samples", [])
    ]
    answers = {sample.get("input") or sample["question"]: sample["target"] for sample in samples}  # some stand twice
    return [{"instruction": question, "input": "", "output": answer} for question, answer in answers.items()]


def opening_of(record: dict[str, Any]) -> tuple[str, ...]:
    """The first question of a record and its answer."""
    if "conversations" in record:
        return tuple(str(turn["value"]) for turn in record["conversations"][:2])
    return record["instruction"], record.get("input", ""), record["output"]


def configure(folder: Path, target: str, seed: int, rate: float, **changes: object) -> RunConfig:
    return dataflex.load_config(
        options={
            "model_name_or_path": str(LIBRARY / "models/SmolLM2-135M-Instruct"),
            "template": "smollm2",
            "cutoff_len": 256 if target in OUTSIDE else 96,  # a question there is longer than 96 tokens
            "lora_rank": 16,
            "dataset_dir": str(folder),
            "dataset": [f"pool_{kind}" for kind in KINDS],
            "eval_dataset": [f"target_{target}"],
            "held_out": [f"held_{target}"],
            "per_device_train_batch_size": 2,
            "learning_rate": rate,
            "num_train_epochs": 1.0,
            "warmup_step": 10,
            "disable_gradient_checkpointing": True,
            "token_budget": 1024,
            "seed": seed,
            "seeds": 1,
            "budget": 0.2,
            **changes,
        }
    )


def measured(config: RunConfig) -> dict[str, np.ndarray]:
    """[held-out rows] the losses of each arm."""
    folder = dataflex.compare(config)
    part = "0.2" if config.by == "rows" else "0.2-tokens"
    losses = {"untouched": folder / "untouched.rows.jsonl"}
    for run in json.loads((folder / "report.json").read_text(encoding="utf-8"))["runs"]:
        name = file_name(f"{run['arm']}-{'1' if run['arm'] == ALL else part}")
        losses[run["arm"]] = folder / f"seed-{config.seed}" / "evals" / f"{name}.rows.jsonl"
    return {
        arm: np.array([json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()])
        for arm, path in losses.items()
    }


def tune(root: Path, targets: list[str], seeds: list[int]) -> None:
    """Print the random arm's loss on held-out rows by target and learning rate."""
    print(f"| learning rate | {' | '.join(targets)} | mean |\n|---|{'---|' * (len(targets) + 1)}")
    for rate in RATES:
        row = []
        for target in targets:
            found = []
            for seed in seeds:
                folder = root / f"data-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                write_data(folder, seed)
                output = str(root / f"{target}-{seed}-{rate:g}")
                config = configure(folder, target, seed, rate, selectors=["random"], output=output)
                losses = measured(config)
                found.append(losses["random"].mean() - losses["untouched"].mean())
            row.append(float(np.mean(found)))
        print(f"| {rate:g} | {' | '.join(f'{value:+.3f}' for value in row)} | {np.mean(row):+.3f} |", flush=True)


def kept_losses() -> dict[str, Any]:
    """What training_losses.json holds."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def keep_losses(root: Path, by: str, target: str, seed: int, losses: dict[str, np.ndarray]) -> None:
    """Add the losses of one comparison to training_losses.json, to which another process may add as well. `by` is rows,
    tokens or deciles."""
    with Lock(root / "losses.lock", wait=True):
        kept = kept_losses()
        rounded = {arm: np.round(values, 5).tolist() for arm, values in losses.items()}
        kept.setdefault(by, {}).setdefault(target, {})[str(seed)] = rounded
        write_text(KEPT, json.dumps(kept, sort_keys=True).replace("}, ", "},\n").replace("], ", "],\n") + "\n")


def compare(root: Path, targets: list[str], seeds: list[int], by: str, anew: bool) -> None:
    """Measure the arms for each target and seed, and print their table."""
    of_target: dict[str, list[dict[str, np.ndarray]]] = {target: [] for target in targets}
    for seed in seeds:  # outermost, so that what is done when the script is stopped covers every target
        folder = root / f"data-{seed}"
        for target, by_seed in of_target.items():
            kept = kept_losses().get(by, {}).get(target, {}).get(str(seed))
            if kept is not None and not anew:
                by_seed.append({arm: np.array(losses) for arm, losses in kept.items()})
                continue
            folder.mkdir(parents=True, exist_ok=True)
            write_data(folder, seed)
            rate = TUNED[target]
            output = str(root / f"{target}-{seed}-{rate:g}")
            arms = [name for name in SELECTORS if target not in OUTSIDE or name != ORACLE]
            losses = measured(configure(folder, target, seed, rate, selectors=arms, by=by, output=output))
            keep_losses(root, by, target, seed, losses)
            by_seed.append(losses)
    show(of_target, by)


def show(of_target: dict[str, list[dict[str, np.ndarray]]], by: str) -> None:
    """Print a row for each arm: by target its loss against random rows, the 95% interval, and in how many seeds it is
    lower; then the share of the gap between random and oracle that it closes, the mean over targets that have one."""
    cells: dict[str, list[str]] = {}
    closed: dict[str, list[float]] = {}
    for target, by_seed in of_target.items():
        losses = {arm: np.stack([found[arm] for found in by_seed]) for arm in by_seed[0]}
        to_oracle = paired_difference(losses[ORACLE], losses["random"]) if ORACLE in losses else {"high": 0.0}
        print(f"{target}, by {by}, {len(by_seed)} seeds: random {losses['random'].mean():.4f}")
        for arm, own in losses.items():
            if arm == "random":
                continue
            found = paired_difference(own, losses["random"])
            wins = int((own.mean(axis=1) < losses["random"].mean(axis=1)).sum())
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            cells.setdefault(arm, []).append(f"{found['difference']:+.3f} ({interval}), {wins} of {len(by_seed)}")
            if to_oracle["high"] < 0:  # a gap that is not told apart from 0 has no share
                closed.setdefault(arm, []).append(found["difference"] / to_oracle["difference"])
    print(f"\n| arm | {' | '.join(of_target)} | of the gap |\n|---|{'---|' * (len(of_target) + 1)}")
    for arm, texts in cells.items():
        share = f"{np.mean(closed[arm]):.0%}" if arm in closed else "none there"
        print(f"| {arm.partition(':')[0]} | {' | '.join(texts)} | {share} |")


def deciles(root: Path, targets: list[str], seeds: list[int], anew: bool) -> None:
    """Measure each tenth of each ranking, and print the correlation of its place with the loss by target."""
    of_target: dict[str, list[dict[str, np.ndarray]]] = {target: [] for target in targets}
    for seed in seeds:
        folder = root / f"data-{seed}"
        for target, by_seed in of_target.items():
            kept = kept_losses().get("deciles", {}).get(target, {}).get(str(seed))
            if kept is None or anew:
                folder.mkdir(parents=True, exist_ok=True)
                write_data(folder, seed)
                rate = TUNED[target]
                output = str(root / f"{target}-{seed}-{rate:g}")
                config = configure(folder, target, seed, rate, selectors=RANKED, deciles=True, output=output)
                report = json.loads((dataflex.compare(config) / "report.json").read_text(encoding="utf-8"))
                kept = {name: np.array(found["loss"]) for name, found in report["deciles"].items()}
                keep_losses(root, "deciles", target, seed, kept)
            by_seed.append({name: np.array(losses) for name, losses in kept.items()})
    print("| ranking | target | seeds | losses from the best tenth to the worst | Spearman of the mean | by seed |")
    print("|---|---|---|---|---|---|")
    for target, by_seed in of_target.items():
        for name in by_seed[0]:
            found = decile_test(np.stack([losses[name] for losses in by_seed]))
            losses = ", ".join(f"{loss:.3f}" for loss in found["loss"])
            singly = ", ".join(f"{value:+.2f}" for value in found["by_seed"])
            print(f"| {name} | {target} | {len(by_seed)} | {losses} | {found['spearman']:+.2f} | {singly} |")


def again(root: Path, targets: list[str], seeds: list[int], times: int) -> None:
    """Train `times` times more on the rows that each arm of AGAIN took in a finished comparison; print the losses."""
    print("| target | seed | arm | rows of the target's kind | calling a tool | held-out loss, as compared and again |")
    print("|---|---|---|---|---|---|")
    for target in targets:
        for seed in seeds:
            folder, rate = root / f"data-{seed}", TUNED[target]
            done = root / f"{target}-{seed}-{rate:g}"
            runs = {run["arm"]: run for run in json.loads((done / "report.json").read_text(encoding="utf-8"))["runs"]}
            for arm in AGAIN:
                rows = done / f"seed-{seed}/subsets/{file_name(arm)}-0.2.jsonl"
                records = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
                losses = [json.loads((done / f"seed-{seed}/evals/{file_name(arm)}-0.2.json").read_text())["loss"]]
                for time in range(1, times + 1):
                    output = root / f"again/{target}-{seed}-{arm}-{time}"
                    own = {"output_dir": str(output), "output": str(output / "eval.json"), "max_new_tokens": 0}
                    plain = configure(folder, target, seed, rate, **own).changed(seed=seed + 1000 * time)
                    dataflex.train(plain.changed(dataset=[str(rows)], eval_dataset=None))
                    measured_again = dataflex.evaluate(plain.changed(adapter_name_or_path=[str(output)]))
                    losses.append(json.loads(measured_again.read_text(encoding="utf-8"))["loss"])
                kind = runs[arm]["picked"][f"pool_{target}"]
                shown = ", ".join(f"{loss:.3f}" for loss in losses)
                print(
                    f"| {target} | {seed} | {arm} | {kind} of {len(records)} | {calls(records)} | {shown} |", flush=True
                )
            for part in ("target", "held"):
                records = json.loads((folder / f"{part}_{target}.json").read_text(encoding="utf-8"))
                print(f"{target}, seed {seed}: {calls(records)} of {len(records)} rows of {part} call a tool")


def calls(records: list[dict[str, Any]]) -> int:
    """How many of the records call a tool, as rows of glaive_toolcall_en_demo or as messages."""
    texts = [json.dumps(record) for record in records]
    return sum('"function_call"' in text or '"tool_calls"' in text for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS, *OUTSIDE], default=[*TARGETS])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--by", choices=["rows", "tokens"], default="rows")
    parser.add_argument("--deciles", action="store_true")
    parser.add_argument("--again", type=int, metavar="N")
    parser.add_argument("--anew", action="store_true", help="measure what training_losses.json holds as well")
    parser.add_argument("--folder", type=Path, default=Path("saves/evidence/training"))
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments.folder, arguments.targets, arguments.seeds)
    elif arguments.again:
        again(arguments.folder, arguments.targets, arguments.seeds, arguments.again)
    elif arguments.deciles:
        deciles(arguments.folder, arguments.targets, arguments.seeds, arguments.anew)
    else:
        compare(arguments.folder, arguments.targets, arguments.seeds, arguments.by, arguments.anew)


if __name__ == "__main__":
    main()
