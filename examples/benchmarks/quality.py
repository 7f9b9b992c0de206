"""How well a projection, a store's format and bfloat16 keep the order of exact scores, on real rows.

    dataflex warmup examples/demo.yaml warmup_step=8 output_dir=saves/benchmarks/warmup
    python examples/benchmarks/quality.py examples/demo.yaml max_samples=100 \\
        checkpoint=saves/benchmarks/warmup/checkpoint-8

Every row's Adam direction is computed once; its exact cosine with the validation rows' mean direction and its
projections by five seeds are taken while it passes. Spearman's rank correlation and the overlap of the top 5% say
how alike the orders are; the spread is over the seeds. The standard deviation of the exact scores says how far
apart the rows lie that have to be told apart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dataflex import load_config
from dataflex.config import RunConfig
from dataflex.data.examples import Split, load_split
from dataflex.gradients.collect import checkpoint_capture
from dataflex.gradients.direction import make_direction
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.influence.exact import exact_cosines
from dataflex.model import load_tokenizer
from dataflex.projection.protocol import Projector
from dataflex.projection.queries import Queries
from dataflex.projection.table import make_projector
from dataflex.provenance import device_name
from dataflex.store.layout import RowLayout
from dataflex.training.moments import load_moments

SEEDS = range(5)
WIDTHS = (1024, 4096, 8192)
FORMATS = ("float32", "float16", "int8", "int1")


class SideBySide:
    """Several projectors over one pass, their images one after the other."""

    def __init__(self, projectors: Sequence[Projector]) -> None:
        self.projectors = projectors
        self.ends = np.cumsum([projector.dim for projector in projectors]).tolist()
        self.dim = self.ends[-1]

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        for projector, end in zip(self.projectors, self.ends, strict=True):
            projector.add(out[:, end - projector.dim : end], offset, values.clone())


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(*(values.argsort().argsort() for values in (first, second)))[0, 1])


def top_overlap(first: np.ndarray, second: np.ndarray, share: float = 0.05) -> float:
    count = max(1, int(share * len(first)))
    best = [set(np.argsort(-values)[:count].tolist()) for values in (first, second)]
    return len(best[0] & best[1]) / count


def line(name: str, exact: np.ndarray, found: Sequence[np.ndarray]) -> str:
    """A row of the table: mean ± standard deviation over the seeds."""
    pairs = [(spearman(exact, scores), top_overlap(exact, scores)) for scores in found]
    cells = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in zip(*pairs, strict=True)]
    return f"| {name} | " + " | ".join(cells if len(found) > 1 else [cell.split(" ")[0] for cell in cells]) + " |"


def measure(config: RunConfig, train: Split, validation: Split, pad_token_id: int) -> list[str]:
    held = load_moments(Path(config.checkpoint[0]))
    capture = checkpoint_capture(config, Path(config.checkpoint[0]), pad_token_id)
    direction = make_direction("adam", config.adam_formula, held, capture.slots)
    sketches = [make_projector("sketch", capture.parameters, k, seed, capture.device) for k in WIDTHS for seed in SEEDS]

    projectors = SideBySide([*sketches, Whole(capture.parameters)])
    images, mean = (
        np.zeros((len(validation.examples), projectors.ends[-2]), np.float32),
        torch.zeros(capture.parameters),
    )
    plain = make_direction("sgd", config.adam_formula, None, capture.slots)
    for rows in project_rows(capture, validation.examples, [[i] for i in range(len(images))], plain, projectors):
        image, vector = rows.vectors.cpu().split([projectors.ends[-2], capture.parameters], dim=1)
        images[rows.indices] = image
        mean += vector[0] / vector.norm() / len(images)

    projectors = SideBySide([*sketches, Queries(mean[None].to(capture.device))])
    found = np.zeros((len(train.examples), projectors.dim), np.float32)
    for rows in project_rows(
        capture, train.examples, batches_of(capture, train.examples, projectors.dim), direction, projectors
    ):
        found[rows.indices] = rows.vectors.cpu()
    exact = found[:, -2] / np.sqrt(found[:, -1])

    lines = [f"standard deviation of the exact scores: {exact.std():.4f}, mean {exact.mean():.4f}", ""]
    lines += ["| against exact | Spearman | top-5% overlap |", "|---|---|---|"]
    starts = [0, *projectors.ends]
    for width_index, width in enumerate(WIDTHS):
        for kind in FORMATS:
            scores = []
            for seed in SEEDS:
                place = slice(*starts[width_index * len(SEEDS) + seed :][:2])
                rows, queries = (stored(vectors[:, place], kind) for vectors in (found, images))
                scores.append(rows @ queries.mean(axis=0))
            lines.append(line(f"sketch, k = {width}, {kind}", exact, scores))
    lines.append(line("bfloat16 model, exact", exact, [in_bfloat16(config, train, validation, pad_token_id)]))
    return lines


class Whole:
    """The vector itself, as one more projector."""

    def __init__(self, parameters: int) -> None:
        self.dim = parameters

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        out[:, offset : offset + values.shape[1]] = values


def stored(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows as a store of this format gives them back."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    layout = RowLayout(kind, rows.shape[1])
    return layout.decode(layout.encode(unit))


def in_bfloat16(config: RunConfig, train: Split, validation: Split, pad_token_id: int) -> np.ndarray:
    config = config.changed(bf16=True)
    held = load_moments(Path(config.checkpoint[0]))
    capture = checkpoint_capture(config, Path(config.checkpoint[0]), pad_token_id)
    directions = [make_direction(kind, config.adam_formula, held, capture.slots) for kind in ("adam", "sgd")]
    return exact_cosines(capture, train.examples, validation.examples, *directions)[1][0]


def main() -> None:
    path, *overrides = sys.argv[1:]
    config = load_config(path, overrides)
    tokenizer = load_tokenizer(config)
    train, validation = (load_split(config, tokenizer, name) for name in ("train", "eval"))
    print(
        f"{device_name()}; {len(train.examples)} rows against {len(validation.examples)}, {config.model_name_or_path}"
    )
    print("\n".join(measure(config, train, validation, tokenizer.pad_token_id)))


if __name__ == "__main__":
    main()
