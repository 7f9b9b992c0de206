"""Gradient stores made of given vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dataflex.store.manifest import Manifest
from dataflex.store.writer import StoreWriter, create_store


def make_store(
    path: Path, rows: np.ndarray, *, subtask=None, rate=1e-4, dtype="float32", plain=None, **changes
) -> Path:
    manifest = {
        "store_dtype": dtype,
        "proj_dim": rows.shape[1],
        "parameters": [["p", 9]],
        "datasets": [["made", 0]],
        "data": "d",
        "learning_rate": rate,
        "projector": "sketch",
        **changes,
    }
    manifest = Manifest.from_json(json.dumps(manifest))
    create_store(path, manifest=manifest, row=np.arange(len(rows)) * 2, tokens=np.ones(len(rows)), subtask=subtask)
    with StoreWriter(path) as writer:
        writer.write(list(range(len(rows))), rows.astype(np.float32), np.zeros(len(rows)), plain)
    return path


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
