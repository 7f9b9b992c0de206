"""The gradient store, one HDF5 file: how rows are kept, and how they are read. store_writer.py makes and fills it.

A row whose direction is all zero or not finite has no place among unit vectors. Where such rows are to be
skipped they are done, with norm 0 and zeros for a vector: `GradientStore.bad`. Nothing scores or selects them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dataflex.errors import UsageError

FORMAT = "dataflex-gradients"
VERSION = 1
TILE_NUMBERS = 1 << 20  # 4 MiB of float32
WIDTH_DTYPE = {"float16": np.float16, "float32": np.float32, "int8": np.int8, "int1": np.uint8}


def encode_rows(unit: np.ndarray, dtype: str) -> np.ndarray:
    """Unit rows [n, k] float32 as they are stored: int8 scaled to its row's largest, int1 signs packed 8 to a byte."""
    if dtype == "int8":
        largest = np.abs(unit).max(axis=1, keepdims=True)
        return np.rint(unit * np.divide(127, largest, out=largest, where=largest > 0)).astype(np.int8)
    if dtype == "int1":
        return np.packbits(unit >= 0, axis=1)
    return unit.astype(WIDTH_DTYPE[dtype])


def to_float(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Write stored rows to `out` [n, k] float32, as long as they happen to be: signs are ±1."""
    if dtype == "int1":
        np.multiply(np.unpackbits(stored, axis=1, count=out.shape[1]), 2, out=out)
        out -= 1
    else:  # numpy takes ten times as long over float16
        import torch

        torch.from_numpy(out).copy_(torch.from_numpy(stored))


def decode_rows(stored: np.ndarray, dtype: str, dim: int) -> np.ndarray:
    """Stored rows as unit rows [n, k] float32: rounding is undone by normalising again."""
    rows = np.empty((len(stored), dim), dtype=np.float32)
    to_float(stored, dtype, rows)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)  # a row not done yet is zero


class GradientStore:
    """A store opened for reading. Rows come as unit float32 vectors, whatever dtype they are kept in."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r")
        except FileNotFoundError:
            raise UsageError(f"gradient store {path}: no such file; write it with `dataflex grads`") from None
        except OSError as error:
            raise UsageError(
                f"gradient store {path}: not a readable HDF5 file ({error}); write it again with --overwrite"
            ) from None
        try:
            attributes = dict(self._file.attrs)
            if attributes.get("format") != FORMAT:
                raise UsageError(f"gradient store {path}: not a gradient store; write one with `dataflex grads`")
            if attributes.get("version") != VERSION:
                raise UsageError(
                    f"gradient store {path}: format version {attributes.get('version')}, expected {VERSION}"
                )
            self.manifest: dict[str, Any] = json.loads(attributes["manifest"])
            self.dtype: str = self.manifest["store_dtype"]
            self.dim: int = self.manifest["proj_dim"]
            self.row: np.ndarray = self._file["row"][:]
            self.tokens: np.ndarray = self._file["tokens"][:]
            self.subtask: list[str] | None = (
                self._file["subtask"].asstr()[:].tolist() if "subtask" in self._file else None
            )
            checksum = checksum_of(attributes["manifest"], self.row, self.tokens, self.subtask)
            # a store that another program made may have none
            self.sound = attributes.get("checksum", checksum) == checksum
        except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
            self._file.close()
            raise UsageError(f"gradient store {path}: damaged ({error}); write it again with --overwrite") from None

    def __enter__(self) -> GradientStore:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.row)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.dim

    @property
    def done(self) -> np.ndarray:
        """[N] uint8: 1 where the row's bytes are on disk."""
        return self._file["done"][:]

    @property
    def norm(self) -> np.ndarray:
        """[N] float32: length of each projected direction before it was made a unit vector."""
        return self._file["norm"][:]

    @property
    def bad(self) -> np.ndarray:
        """[N] bool: rows that are done, and were skipped because their direction is all zero or not finite."""
        return (self.done == 1) & (self.norm == 0)

    @property
    def loss(self) -> np.ndarray:
        """[N] float32: mean cross-entropy of each row."""
        return self._file["loss"][:]

    @property
    def dataset(self) -> list[str] | None:
        """Each row's dataset where several were collected, else None."""
        starts = self.manifest["datasets"]
        if len(starts) < 2:
            return None
        places = np.searchsorted([row for _, row in starts], self.row, side="right") - 1
        return [starts[place][0] for place in places]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Unit rows, [n, k] float32 ([k] for a single index)."""
        if isinstance(rows, (int, np.integer)):
            index = range(len(self))[rows]
            return self[index : index + 1][0]
        decoded = decode_rows(self._file["gradients"][rows], self.dtype, self.dim)
        if self.dtype == "int1":  # signs have no zero
            decoded[self._file["norm"][rows] == 0] = 0
        return decoded

    def tiles(self, start: int, stop: int, numbers: int = TILE_NUMBERS) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, rows [n, k] float32 as long as they are kept) from `start` to `stop`, some at a time.

        They come in one buffer, small enough for a core's cache: use them before the next. Threads may each have
        their own; the bytes are read past HDF5, which lets one thread in at a time.
        """
        data = self._file["gradients"]
        count = max(1, numbers // self.dim)
        floats = np.empty((count, self.dim), dtype=np.float32)
        raw = np.empty((count, *data.shape[1:]), dtype=data.dtype)
        place, stride = data.id.get_offset(), raw[0].nbytes
        with open(self.path, "rb", buffering=0) as handle:
            for first in range(start, stop, count):
                some = min(count, stop - first)
                if place is None:  # another program has packed the file
                    data.read_direct(raw, np.s_[first : first + some], np.s_[:some])
                else:
                    _read_fully(handle.fileno(), raw[:some], place + first * stride)
                to_float(raw[:some], self.dtype, floats[:some])
                yield first, floats[:some]

    def require_sound(self) -> None:
        """Raise a UsageError if what the file says of its rows is not what was once written."""
        if not self.sound:
            raise UsageError(
                f"gradient store {self.path}: damaged, its manifest or rows do not have the checksum they were written "
                "with; write it again with --overwrite"
            )

    def require_whole(self) -> None:
        """Raise a UsageError unless the file is sound and every row is done."""
        self.require_sound()
        done = self.done
        if not done.all():
            missing = self.row[done == 0]
            raise UsageError(
                f"gradient store {self.path}: {len(missing)} of {len(self)} rows are not done "
                f"(first: row {missing[0]}); run the same `dataflex grads` command again to finish it"
            )


def _read_fully(handle: int, into: np.ndarray, place: int) -> None:
    """Fill an array from a place in a file. Raises an OSError where the file ends before it is full."""
    room = memoryview(into.reshape(-1).view(np.uint8))
    while room:
        got = os.preadv(handle, [room], place)
        if not got:
            raise OSError("the file ends too early")
        room, place = room[got:], place + got


def open_store(path: str | Path) -> GradientStore:
    """Open a gradient store for reading."""
    return GradientStore(path)


def checksum_of(manifest: str, row: np.ndarray, tokens: np.ndarray, subtask: Sequence[str] | None) -> str:
    """sha256 (hex) over what a store says of its rows before any is computed."""
    digest = hashlib.sha256(manifest.encode())
    digest.update(row.astype("<i8").tobytes())
    digest.update(tokens.astype("<i4").tobytes())
    digest.update(json.dumps(subtask).encode())
    return digest.hexdigest()
