"""Scoring a large store against reading it: how close `score` comes to the speed of the file.

    python examples/benchmarks/score_store.py --rows 250000     # 4.1 GB in float16 at k = 8192

Writes a store of random unit rows and one of ten validation rows (to a temporary folder, removed afterwards), then
takes `cat` to /dev/null and the scoring in turn. Both read from the page cache after the first time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from dataflex import open_store
from dataflex.influence.stored import stored_cosines
from dataflex.provenance import device_name
from dataflex.store.manifest import Manifest
from dataflex.store.writer import StoreWriter, create_store

DIM = 8192
BLOCK = 2000


def write_store(path: Path, rows: int) -> None:
    manifest = Manifest(store_dtype="float16", proj_dim=DIM)
    create_store(path, manifest=manifest, row=np.arange(rows), tokens=np.ones(rows, np.int32), subtask=None)
    vectors = np.random.default_rng(0).normal(size=(BLOCK, DIM)).astype(np.float32)
    with StoreWriter(path) as writer:
        for start in range(0, rows, BLOCK):
            indices = list(range(start, min(rows, start + BLOCK)))
            writer.write(indices, np.roll(vectors, start, axis=1)[: len(indices)], np.ones(len(indices), np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--folder", help="where the store is written; the system's temporary folder when left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        train, validation = Path(folder) / "train.h5", Path(folder) / "eval.h5"
        write_store(train, args.rows)
        write_store(validation, 10)
        print(f"{device_name()}; {args.rows} rows, {train.stat().st_size / 1e9:.2f} GB")
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(f"cat '{train}' > /dev/null", shell=True, check=True)
            reading = time.perf_counter() - started
            with open_store(train) as ours, open_store(validation) as theirs:
                started = time.perf_counter()
                stored_cosines(ours, theirs)
                scoring = time.perf_counter() - started
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"cat {reading:.2f} s, scoring {scoring:.2f} s, {scoring / reading:.2f} times; {memory:.2f} GB resident"
            )


if __name__ == "__main__":
    main()
