"""Which selector finds the rows of the target's own kind? Average precision over a pool of kinds of real rows.

    .venv/bin/python examples/evidence/retrieval.py --seeds 1 2 3
    .venv/bin/python examples/evidence/retrieval.py --seeds 1 2 3 --all-kinds
    .venv/bin/python examples/evidence/retrieval.py --seeds 1 --warmup-steps 0 1 4 10 40

The pool is 40 rows each of general instructions in English and in Chinese, of questions about the model's identity and
of tool calls; 10 other rows of each kind are the target in turn. With --all-kinds it is 24 rows each of all of
LLaMA-Factory's demo sets for chats: also tool calls in Chinese, the chosen answers of its two preference sets, and the
rows of its set for KTO that are labelled good. SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, 256 tokens, 10
warm-up steps of 4 rows; with none the adapter is untrained and Adam's moments are zeros. Directions are whole where no
k is named. Prints tables by score; by the number of validation rows, of which there are 50 (four kinds and 10 steps of
warm-up alone); by the kind that is looked for, where the target is another one; and of a sketch's error beside the
spread of the scores. A seed takes 3 GB of disk in --folder while it is measured; one that is done is read from there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dataflex
from dataflex.config import needed
from dataflex.data.examples import load_split
from dataflex.data.rows import supervised_tokens
from dataflex.gradients.capture import Capture
from dataflex.gradients.collect import checkpoint_capture
from dataflex.gradients.direction import make_direction, plain_direction
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.influence.projection_error import projection_correlation
from dataflex.influence.scores import length_correlation, round_robin, standardise
from dataflex.model import load_tokenizer
from dataflex.progress import SILENT
from dataflex.projection.identity import Identity
from dataflex.projection.table import make_projector
from dataflex.selectors.bm25 import bm25, words
from dataflex.selectors.combined import combine
from dataflex.selectors.embed import embed, load_embedder
from dataflex.selectors.protocol import Situation
from dataflex.selectors.rds import row_vectors
from dataflex.selectors.similarity import unit
from dataflex.training.moments import AdamMoments, load_moments

KINDS = {
    "en": "alpaca_en_demo",
    "zh": "alpaca_zh_demo",
    "identity": "identity",
    "tools": "glaive_toolcall_en_demo",
}
FURTHER = {
    "tools zh": "glaive_toolcall_zh_demo",
    "chosen en": "dpo_en_demo",
    "chosen zh": "dpo_zh_demo",
    "good en": "kto_en_demo",
}
RELATIVES = (("en", "chosen en", "good en"), ("zh", "chosen zh"), ("tools", "tools zh"))
"""Kinds that hold the same task or the same language."""
TARGET = 10
"""Rows of a target."""
UPPER = 15  # of 30 layers: where the upper half begins
SCALE = 1000.0  # unit vectors of millions of numbers, kept as float16
DRAWS = 10  # of random reference rows
UNTRAINED = 1e-30
"""A learning rate that leaves the adapter as it was drawn."""
LIBRARY = Path(__file__).resolve().parent.parent.parent

Cosines = np.ndarray
"""[pool, pool + targets]: of a pool row's direction with the plain gradient of each row."""

DIRECTIONS: dict[str, tuple[str, str, bool]] = {
    "less": ("adam", "torch", False),
    "marginal": ("adam", "torch", True),
    "sgd": ("sgd", "torch", False),
    "less formula": ("adam", "less", False),
    "dataflex formula": ("adam", "dataflex", False),
}
"""By name: gradient_type, adam_formula, marginal."""
PARTS: dict[str, Callable[[str], bool]] = {
    "": lambda name: True,
    " upper": lambda name: layer_of(name) >= UPPER,
    " B": lambda name: name.endswith("lora_B.weight"),
}
"""By name: which tensors enter the cosine."""
CLOSER = ("less", "less, marginal, contrast pool", "rds", "bm25", "less+rds, marginal, contrast pool")
NUMBERS = (2, 5, 10, 50)
"""The scores and the numbers of validation rows of the second table."""
WIDTHS = (8192, 4096)
"""k of the sketches of the direction `less`."""


@dataclass(frozen=True)
class Setting:
    """Which rows there are."""

    kinds: dict[str, str]
    pool: int
    """Rows of each kind in the pool."""
    most: int
    """Rows of each kind outside the pool; the target is the first TARGET of them."""


def write_data(folder: Path, setting: Setting, seed: int) -> None:
    """A pool and a target of each kind, and the dataset_info.json that names them."""
    source = json.loads((LIBRARY / "data/dataset_info.json").read_text(encoding="utf-8"))
    info = {}
    for kind, name in setting.kinds.items():
        records = json.loads((LIBRARY / "data" / source[name]["file_name"]).read_text(encoding="utf-8"))
        drawn = random.Random(f"{seed} {kind}").sample(chats_of(records), setting.pool + setting.most)
        entry = dict(source[name])
        entry.pop("ranking", None)
        for column in ("chosen", "rejected", "kto_tag"):  # these are gone from the rows
            entry.get("columns", {}).pop(column, None)
        for part, rows in (("pool", drawn[: setting.pool]), ("target", drawn[setting.pool :])):
            info[f"{part}_{kind}"] = {**entry, "file_name": f"{part}_{kind}.json"}
            (folder / f"{part}_{kind}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def chats_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chats as they are; of preferences the chosen answer, of labelled answers the good ones."""
    if "chosen" in records[0]:
        return [{"conversations": [*record["conversations"], record["chosen"]]} for record in records]
    if "label" in records[0]:
        return [{"messages": record["messages"]} for record in records if record["label"]]
    return records


def measure(folder: Path, setting: Setting, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Cosines by kind of direction after `steps` steps of warm-up, similarities by RDS, BM25 and embeddings, and the
    pool's supervised tokens."""
    write_data(folder, setting, seed)
    config = dataflex.load_config(
        options={
            "model_name_or_path": str(LIBRARY / "models/SmolLM2-135M-Instruct"),
            "template": "qwen",
            "cutoff_len": 256,
            "lora_rank": 16,
            "dataset_dir": str(folder),
            "dataset": [f"pool_{kind}" for kind in setting.kinds],
            "eval_dataset": [f"target_{kind}" for kind in setting.kinds],
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-4 if steps else UNTRAINED,
            "warmup_step": max(steps, 1),
            "disable_gradient_checkpointing": True,
            "seed": seed,
            "token_budget": 1024,
            "embed_model": str(LIBRARY / "models/SmolLM2-135M-Instruct"),
            "output_dir": str(folder / "warmup"),
        }
    )
    checkpoint = dataflex.warmup(config)
    tokenizer = load_tokenizer(config)
    train, targets = (load_split(config, tokenizer, split) for split in ("train", "eval"))
    capture = checkpoint_capture(config, checkpoint, tokenizer.pad_token_id)
    rows = [*train.examples, *targets.examples]
    plain = np.lib.format.open_memmap(
        folder / "plain.npy", mode="w+", dtype=np.float16, shape=(len(rows), capture.parameters)
    )
    norms = np.zeros(len(rows), dtype=np.float32)
    identity = Identity(capture.parameters)
    for batch in project_rows(capture, rows, batches_of(capture, rows, identity.dim), plain_direction, identity):
        for index, vector in zip(batch.indices, batch.vectors, strict=True):
            norms[index] = vector.norm()
            plain[index] = (vector / norms[index] * SCALE).numpy()

    moments = load_moments(checkpoint) if steps else without_steps(load_moments(checkpoint))
    found = cosines_of(capture, moments, plain, norms, len(train.examples))
    del plain
    (folder / "plain.npy").unlink()

    count = len(train.examples)
    situation = Situation(
        config, tokenizer, train, targets, lambda: capture, moments, moments.step, folder, folder, [], SILENT
    )
    vectors = row_vectors(situation, rows, "hidden states")
    centred = unit(vectors - vectors[:count].mean(axis=0))
    found["rds"] = centred[:count] @ centred.T
    texts = [words(tokenizer.decode(row.input_ids, skip_special_tokens=True)) for row in rows]
    found["bm25"] = np.array(list(bm25(texts[:count], texts))).T
    embeddings = unit(embed(load_embedder(needed(config.embed_model)), situation, rows, "embeddings"))
    found["embed"] = embeddings[:count] @ embeddings.T
    found["tokens"] = supervised_tokens(train.examples)
    return found


def without_steps(moments: AdamMoments) -> AdamMoments:
    """The moments of an optimizer that has taken no step."""
    return replace(
        moments,
        exp_avg={name: torch.zeros_like(values) for name, values in moments.exp_avg.items()},
        exp_avg_sq={name: torch.zeros_like(values) for name, values in moments.exp_avg_sq.items()},
        steps=dict.fromkeys(moments.steps, 0),
        step=0,
    )


def cosines_of(
    capture: Capture, moments: AdamMoments, plain: np.ndarray, norms: np.ndarray, count: int
) -> dict[str, Cosines]:
    """The cosines of each of DIRECTIONS over each of PARTS, and of sketches of the direction `less`."""
    directions = {name: make_direction(*how[:2], moments, capture.slots, how[2]) for name, how in DIRECTIONS.items()}
    ways = [(name, part) for name in DIRECTIONS for part in PARTS if part == "" or name in ("less", "marginal")]
    products = {way: np.zeros((count, len(norms))) for way in ways}
    squares = {way: np.zeros(count) for way in ways}
    lengths = {part: np.zeros(len(norms)) for part in PARTS}
    sketches = {dim: make_projector("sketch", capture.parameters, dim, 123, "cpu") for dim in WIDTHS}
    images = {dim: (torch.zeros(count, dim), torch.zeros(len(norms), dim)) for dim in WIDTHS}
    for slot in capture.slots:
        span = slice(slot.offset, slot.offset + slot.size)
        units = torch.from_numpy(plain[:, span].astype(np.float32)) / SCALE
        own = units.double().square().sum(dim=1).numpy()
        for part, takes in PARTS.items():
            lengths[part] += own if takes(slot.name) else 0
        for name, direction in directions.items():
            steps = direction(slot, units[:count] * torch.from_numpy(norms[:count, None]))
            product, square = (steps @ units.T).double().numpy(), steps.double().square().sum(dim=1).numpy()
            for way in ways:
                if way[0] == name and PARTS[way[1]](slot.name):
                    products[way] += product
                    squares[way] += square
            if name == "less":
                for dim, sketch in sketches.items():
                    for image, values in zip(images[dim], (steps, units), strict=True):
                        sketch.add(image, slot.offset, values.clone())  # it overwrites them
    found = {
        "".join(way): products[way] / np.sqrt(squares[way])[:, None] / np.sqrt(lengths[way[1]])[None] for way in ways
    }
    for dim, pair in images.items():
        directions_of, gradients_of = (unit(image.numpy()) for image in pair)
        found[f"less k={dim}"] = directions_of @ gradients_of.T
        if dim == WIDTHS[0]:
            found["less k=8192, first half"] = directions_of[:, : dim // 2] @ gradients_of[:, : dim // 2].T
    signs = [np.where(unit(image.numpy()) >= 0, 1.0, -1.0) for image in images[8192]]
    found["less k=8192 int1"] = signs[0] @ signs[1].T / 8192
    return found


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def scorers(found: dict[str, np.ndarray], seed: int) -> dict[str, list[Callable[[slice], np.ndarray]]]:
    """By name: functions from a target's columns to the scores [pool]; several where rows are drawn at random."""
    count = len(found["tokens"])
    generator = np.random.default_rng(seed)
    mean = lambda cosines: lambda target: cosines[:, target].mean(axis=1)  # noqa: E731
    table: dict[str, list[Callable[[slice], np.ndarray]]] = {}
    for name, label in (("less", "less"), ("marginal", "less, marginal"), ("sgd", "less, sgd")):
        cosines = found[name]
        table[label] = [mean(cosines)]
        for size in (8, 32, 128):
            drawn = [generator.choice(count, size, replace=False) for _ in range(DRAWS)]
            table[f"{label}, contrast {size}"] = [
                mean(cosines - cosines[:, reference].mean(axis=1, keepdims=True)) for reference in drawn
            ]
        table[f"{label}, contrast pool"] = [mean(contrasted(cosines))]
        normalised = cosines.T.copy()
        standardise(normalised)
        table[f"{label}, normalise rows"] = [mean(normalised.T)]
    for name in ("less formula", "dataflex formula", *(f"less k={dim}" for dim in WIDTHS), "less k=8192 int1"):
        table[name.replace("less k", "less, k").replace("less formula", "LESS's own formula")] = [mean(found[name])]
    noise = sketch_error(found)  # it falls with the root of k
    table["less, half of the noise, as k=32768"] = [mean(found["less"] + noise / 2)]
    table["less, marginal, contrast pool, the noise of k=8192"] = [mean(contrasted(found["marginal"] + noise))]
    table["less, reduce rows"] = [lambda target: round_robin(found["less"][:, target].T)]
    table["less, marginal, contrast pool, reduce rows"] = [
        lambda target: round_robin(contrasted(found["marginal"])[:, target].T)
    ]
    table["less, B alone"] = [mean(found["less B"])]
    table["less, layers 15-29"] = [mean(found["less upper"])]
    table["less, marginal, contrast pool, layers 15-29"] = [mean(contrasted(found["marginal upper"]))]
    for name in ("rds", "bm25", "embed"):
        table[name] = [mean(found[name])]
    rds = mean(found["rds"])
    together = {
        "less+rds": found["less"],
        "less+rds, contrast pool": contrasted(found["less"]),
        "less+rds, marginal, contrast pool": contrasted(found["marginal"]),
        "less+rds, marginal, contrast pool, the noise of k=8192": contrasted(found["marginal"] + noise),
        "less+rds, marginal, contrast pool, layers 15-29": contrasted(found["marginal upper"]),
    }
    for label, cosines in together.items():
        own = mean(cosines)
        table[label] = [lambda target, own=own: combine([own(target), rds(target)])]
    table["length"] = [lambda target: found["tokens"].astype(float)]
    chance = [generator.random(count) for _ in range(DRAWS)]
    table["random"] = [lambda target, drawn=drawn: drawn for drawn in chance]
    return table


def sketch_error(found: dict[str, np.ndarray]) -> Cosines:
    """What the sketch of k = 8192 adds to each cosine of the direction `less`."""
    return found["less k=8192"] - found["less"]


def contrasted(cosines: Cosines) -> Cosines:
    """`contrast: pool`."""
    return cosines - cosines[:, : len(cosines)].mean(axis=1, keepdims=True)


def average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    """The mean, over the wanted rows, of the share of wanted rows among all that score at least as high."""
    hits = wanted[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def quality(
    ways: list[Callable[[slice], np.ndarray]], target: slice, wanted: np.ndarray, tokens: np.ndarray
) -> tuple[float, float]:
    """The mean average precision of `ways`, and their mean correlation with supervised tokens."""
    scores = [way(target) for way in ways]
    precision = np.mean([average_precision(one, wanted) for one in scores])
    return float(precision), float(np.mean([length_correlation(one, tokens) or 0.0 for one in scores]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--warmup-steps", type=int, nargs="+", default=[10])
    parser.add_argument("--all-kinds", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("saves/evidence/retrieval"))
    arguments = parser.parse_args()
    for steps in arguments.warmup_steps:
        if arguments.all_kinds:
            setting = Setting({**KINDS, **FURTHER}, pool=24, most=TARGET)
        else:
            setting = Setting(KINDS, pool=40, most=max(NUMBERS) if arguments.warmup_steps == [10] else TARGET)
        every = []
        for seed in arguments.seeds:
            folder = arguments.folder / f"seed-{seed}-steps-{steps}-kinds-{len(setting.kinds)}-rows-{setting.most}"
            kept = folder / "cosines.npz"
            if not kept.exists():
                folder.mkdir(parents=True, exist_ok=True)
                np.savez(kept, **measure(folder, setting, seed, steps))
            every.append((seed, dict(np.load(kept))))
        print(f"\n{steps} steps of warm-up, {len(setting.kinds)} kinds\n")
        show(setting, every)


def show(setting: Setting, every: list[tuple[int, dict[str, np.ndarray]]]) -> None:
    """Print the tables for the cosines of each seed."""
    kinds = len(setting.kinds)
    kind_of = np.repeat(range(kinds), setting.pool)
    starts = [len(kind_of) + number * setting.most for number in range(kinds)]
    numbers = [number for number in NUMBERS if number <= setting.most]
    results: dict[str, list[list[tuple[float, float]]]] = {}
    by_rows: dict[str, list[list[float]]] = {}
    by_kind: dict[str, list[np.ndarray]] = {}
    by_family: dict[str, list[list[float]]] = {}
    number_of = {kind: number for number, kind in enumerate(setting.kinds)}
    families = [[number_of[kind] for kind in family] for family in RELATIVES if set(family) <= number_of.keys()]
    for seed, found in every:
        for name, ways in scorers(found, seed).items():
            of_kind = [
                [quality(ways, slice(at, at + TARGET), kind_of == wanted, found["tokens"]) for wanted in range(kinds)]
                for at in starts
            ]
            results.setdefault(name, []).append([of_kind[number][number] for number in range(kinds)])
            by_kind.setdefault(name, []).append(np.array(of_kind)[:, :, 0])
            if name in CLOSER:
                wanted = [(number, np.isin(kind_of, family)) for family in families for number in family]
                by_family.setdefault(name, []).append(
                    [
                        quality(ways, slice(starts[number], starts[number] + TARGET), rows, found["tokens"])[0]
                        for number, rows in wanted
                    ]
                )
                by_rows.setdefault(name, []).append(
                    [
                        float(
                            np.mean(
                                [
                                    quality(ways, slice(at, at + rows), kind_of == number, found["tokens"])[0]
                                    for number, at in enumerate(starts)
                                ]
                            )
                        )
                        for rows in numbers
                    ]
                )
    print(f"| score | {' | '.join(setting.kinds)} | mean | by seed |\n|---|{'---|' * (kinds + 2)}")
    for name, by_seed in results.items():
        values = np.array(by_seed)  # [seeds, kinds, 2]
        cells = [f"{p:.2f}, {c:+.2f}" for p, c in values.mean(axis=0)]
        seeds = "; ".join(f"{value:.3f}" for value in values[:, :, 0].mean(axis=1))
        print(f"| {name} | {' | '.join(cells)} | {values[:, :, 0].mean():.3f} | {seeds} |")
    print(f"\n| validation rows | {' | '.join(map(str, numbers))} |\n|---|{'---|' * len(numbers)}")
    for name, counts in by_rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in np.mean(counts, axis=0))} |")
    print("\n| score | target's own kind | another kind | by chance |\n|---|---|---|---|")
    chance = np.mean(by_kind["random"])
    for name in CLOSER:
        values = np.mean(by_kind[name], axis=0)  # [targets, kinds looked for]
        own = np.eye(kinds, dtype=bool)
        print(f"| {name} | {values[own].mean():.3f} | {values[~own].mean():.3f} | {chance:.3f} |")
    if families:
        names = [name for family in RELATIVES for name in family]
        print(f"\n| score, for a kind or its relatives | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for name, of_seeds in by_family.items():
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in np.mean(of_seeds, axis=0))} |")
    headings = ["seed", "error of k=8192: a cosine", "a score", "spread of the scores of less over the pool"]
    headings += ["correlation of both scores", "as estimated"]
    print(f"\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for seed, found in every:
        noise = sketch_error(found)
        targets = [slice(at, at + TARGET) for at in starts]
        of_score = np.mean([noise[:, target].mean(axis=1).std() for target in targets])
        by_target: list[list[str]] = []
        for target in targets:
            exact, sketched, first = (
                found[name][:, target].mean(axis=1) for name in ("less", "less k=8192", "less k=8192, first half")
            )
            measured = np.corrcoef(exact, sketched)[0, 1]
            estimated = projection_correlation([np.stack([first, sketched - first])], [1.0]) or 0.0
            by_target.append([f"{exact.std():.4f}", f"{measured:.2f}", f"{estimated:.2f}"])
        cells = " | ".join(", ".join(values) for values in zip(*by_target, strict=True))
        print(f"| {seed} | {noise.std():.4f} | {of_score:.4f} | {cells} |")


if __name__ == "__main__":
    main()
