"""What `score` and `select` take over a million rows: seconds, and the most memory that is not a file's.

    .venv/bin/python examples/benchmarks/many_scores.py --rows 1000000

The stores hold random bits (int1, k = 8192), the validation store 500 rows, and the source of the rows random words.
Every command runs as a process of its own; its memory is sampled ten times a second. Arrays above 256 MB are in files,
whose pages the system takes back where memory is short.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from dataflex.store.layout import row_checksums
from dataflex.store.manifest import Manifest
from dataflex.store.writer import create_store

DIM = 8192
CHUNK = 10_000
WORDS = [f"word{number}" for number in range(5000)]


def write_store(path: Path, rows: int, split: str, generator: np.random.Generator) -> None:
    """A whole store of random unit vectors."""
    manifest = Manifest("int1", DIM, split=split, learning_rate=1e-4)
    create_store(path, manifest=manifest, row=np.arange(rows), tokens=np.full(rows, 50), subtask=None)
    with h5py.File(path, "r+") as file:
        for start in range(0, rows, CHUNK):
            stop = min(rows, start + CHUNK)
            bits = generator.integers(0, 256, (stop - start, DIM // 8), dtype=np.uint8)
            file["gradients"][start:stop] = bits
            file["checksum"][start:stop] = row_checksums(bits)
        file["norm"][:] = 1
        file["done"][:] = 1


def write_records(path: Path, rows: int) -> None:
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(rows):
            text = " ".join(drawn.choices(WORDS, k=40))
            handle.write(json.dumps({"instruction": text[:120], "output": text[120:]}) + "\n")


def anonymous_memory(process: subprocess.Popen[bytes]) -> int:
    """Bytes of a running process's resident memory that are not pages of a file."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def measure(what: str, *arguments: str) -> None:
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "dataflex", *arguments, "--overwrite", "-q"], stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{what}: exit code {process.returncode}")
    print(f"| {what} | {time.perf_counter() - started:.0f} | {peak / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--validation-rows", type=int, default=500)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="for the files, which are removed; the system's when left out")
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        train, validation, scores = folder / "train.h5", folder / "eval.h5", folder / "scores.jsonl"
        write_store(train, given.rows, "train", generator)
        write_store(validation, given.validation_rows, "eval", generator)
        write_records(folder / "rows.jsonl", given.rows)
        pair = ["--train", str(train), "--eval", str(validation)]
        out = ["-o", str(scores)]
        print("| command | seconds | MB |\n|---|---|---|", flush=True)
        measure("score, one checkpoint", "score", *pair, *out)
        measure(f"score, {given.checkpoints} checkpoints", "score", *pair * given.checkpoints, *out)
        measure("score, reduce: rows, one checkpoint", "score", *pair, *out, "reduce=rows")
        subset = str(folder / "subset.jsonl")
        measure(
            "select, 10 rows",
            *("select", "--scores", str(scores), "--data", str(folder / "rows.jsonl"), "--count", "10", "-o", subset),
        )
    print(f"\n{given.rows:,} rows, k = {DIM}, {given.validation_rows} validation rows")


if __name__ == "__main__":
    main()
