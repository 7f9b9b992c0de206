"""How rows are kept in a store: number formats, offsets in the file, and the checksum of each row's bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import h5py
import numpy as np
import xxhash

from dataflex.errors import UsageError

FORMAT = "dataflex-gradients"
VERSION = 1
StoreDtype = Literal["float16", "float32", "int8", "int1"]
NUMPY_DTYPE: dict[str, type[np.generic]] = {
    "float16": np.float16,
    "float32": np.float32,
    "int8": np.int8,
    "int1": np.uint8,
}
REFERENCE_DATASETS = ("reference", "reference_state")
"""Two sums [2, k] float64 of the unit plain gradients of the reference rows that are done, and the state of each,
[2, 3] int64. Batches overwrite them in turn, so that the sum from before an unfinished batch is there."""

ROW_DATASETS = ("gradients", "norm", "loss", "checksum", "done")
"""What is written of a row once it is computed, in the order in which it is written; `done` comes last."""


@dataclass(frozen=True)
class RowLayout:
    """The number format and the width of the rows of a store."""

    dtype: str
    """As `store_dtype` names it."""
    dim: int
    """k, the dimensions of a row."""

    @property
    def width(self) -> int:
        """Stored numbers a row: k, or k/8 bytes of signs."""
        return -(-self.dim // 8) if self.dtype == "int1" else self.dim

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes in the file: its vector, norm, loss, checksum and done flag."""
        return self.width * np.dtype(NUMPY_DTYPE[self.dtype]).itemsize + 4 + 4 + 8 + 1

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """Unit rows [n, k] float32 as they are stored: int8 scaled to its row's largest, int1 signs packed 8 to a
        byte."""
        if self.dtype == "int8":
            largest = np.abs(unit).max(axis=1, keepdims=True)
            return np.rint(unit * np.divide(127, largest, out=largest, where=largest > 0)).astype(np.int8)
        if self.dtype == "int1":
            return np.packbits(unit >= 0, axis=1)
        return unit.astype(NUMPY_DTYPE[self.dtype])

    def to_float(self, stored: np.ndarray, out: np.ndarray) -> None:
        """Write stored rows to `out` [n, k] float32, in whatever length they are kept: signs are ±1."""
        if self.dtype == "int1":
            np.multiply(np.unpackbits(stored, axis=1, count=self.dim), 2, out=out)
            out -= 1
        else:  # numpy takes ten times as long over float16
            import torch

            torch.from_numpy(out).copy_(torch.from_numpy(stored))

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Stored rows as unit rows [n, k] float32: normalising again undoes the rounding."""
        rows = np.empty((len(stored), self.dim), dtype=np.float32)
        self.to_float(stored, rows)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)  # a row not done yet is zero


@dataclass(frozen=True)
class FileLayout:
    """Where the rows of each dataset begin in a file, and how far apart they are; bytes."""

    offset: dict[str, int]
    stride: dict[str, int]

    @classmethod
    def of(cls, file: h5py.File) -> FileLayout:
        """The layout of an open store.

        Raises:
            UsageError: where another program has packed a dataset, so that its rows have no offset.
        """
        names = [*ROW_DATASETS, *REFERENCE_DATASETS]
        offset = {name: file[name].id.get_offset() for name in names if name in file}
        if None in offset.values():
            packed = next(name for name, start in offset.items() if start is None)
            raise UsageError(
                f"gradient store {file.filename}: dataset {packed} is packed; rows cannot be written to it"
            )
        stride = {
            name: file[name].dtype.itemsize * int(np.prod(file[name].shape[1:], dtype=np.int64)) for name in offset
        }
        return cls(offset, stride)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all datasets."""
        return sum(stride for name, stride in self.stride.items() if name in ROW_DATASETS)


@dataclass(frozen=True)
class ReferenceSum:
    """The weighted sum [k] float64 of the unit plain gradients of reference rows, once `done` rows of the store are."""

    vector: np.ndarray
    weight: float
    """The sum of the weights."""
    done: int

    @property
    def state(self) -> np.ndarray:
        """[3] int64: the rows of the store that are done, the bits of the weight, and the checksum of the vector."""
        weight = np.float64(self.weight).view(np.uint64)
        checksum = xxhash.xxh3_64_intdigest(self.vector.tobytes())
        return np.array([self.done, weight, checksum], dtype=np.uint64).view(np.int64)


def row_checksums(stored: np.ndarray) -> np.ndarray:
    """XXH3 (64 bit) of the bytes of each stored row: [n] uint64."""
    view = memoryview(np.ascontiguousarray(stored).data).cast("B")
    stride = len(view) // len(stored) if len(stored) else 1
    digests = (xxhash.xxh3_64_intdigest(view[start : start + stride]) for start in range(0, len(view), stride))
    return np.fromiter(digests, np.uint64, len(stored))


def header_checksum(manifest: str, row: np.ndarray, tokens: np.ndarray, subtask: Sequence[str] | None) -> str:
    """sha256 (hex) over the part of a store that is written before any row is computed."""
    digest = hashlib.sha256(manifest.encode())
    digest.update(row.astype("<i8").tobytes())
    digest.update(tokens.astype("<i4").tobytes())
    digest.update(json.dumps(subtask).encode())
    return digest.hexdigest()
