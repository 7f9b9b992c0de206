"""The gradient store: one HDF5 file, allocated once, whose rows are then written in place.

All of HDF5's own metadata is final before the first row is written; rows go to their place in the
file as raw bytes, and a row's `done` flag follows only after its data is on disk. So the file opens
with plain h5py at any moment, and a killed run loses at most the rows it had not committed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dataflex.errors import DataflexError, UsageError

FORMAT = "dataflex-gradients"
VERSION = 1
WIDTH_DTYPE = {"float16": np.float16, "float32": np.float32, "int8": np.int8, "int1": np.uint8}


def encode_rows(unit: np.ndarray, dtype: str) -> np.ndarray:
    """Unit rows [n, k] float32 as they are stored: int8 scaled to its row's largest, int1 signs packed 8 to a byte."""
    if dtype == "int8":
        return np.rint(unit * (127 / np.abs(unit).max(axis=1, keepdims=True))).astype(np.int8)
    if dtype == "int1":
        return np.packbits(unit >= 0, axis=1)
    return unit.astype(WIDTH_DTYPE[dtype])


def decode_rows(stored: np.ndarray, dtype: str, dim: int) -> np.ndarray:
    """Stored rows as unit rows [n, k] float32: rounding is undone by normalising again."""
    if dtype == "int1":
        return (np.unpackbits(stored, axis=1, count=dim).astype(np.float32) * 2 - 1) / np.float32(dim) ** 0.5
    rows = stored.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)  # a row not done yet is zero


class GradientStore:
    """A store opened for reading. Rows come as unit float32 vectors, whatever dtype they are kept in."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r")
        except FileNotFoundError:
            raise UsageError(f"gradient store {path}: no such file; write it with `dataflex grads`") from None
        except OSError as error:
            raise UsageError(f"gradient store {path}: not a readable HDF5 file ({error})") from None
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
        except (KeyError, ValueError, TypeError) as error:
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
            return decode_rows(self._file["gradients"][index : index + 1], self.dtype, self.dim)[0]
        return decode_rows(self._file["gradients"][rows], self.dtype, self.dim)

    def blocks(self, rows: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, unit rows) for the whole store, `rows` at a time."""
        for start in range(0, len(self), rows):
            yield start, self[start : start + rows]

    def require_whole(self) -> None:
        """Raise a UsageError unless every row is done."""
        done = self.done
        if not done.all():
            missing = self.row[done == 0]
            raise UsageError(
                f"gradient store {self.path}: {len(missing)} of {len(self)} rows are not done "
                f"(first: row {missing[0]}); run the same `dataflex grads` command again to finish it"
            )


def open_store(path: str | Path) -> GradientStore:
    """Open a gradient store for reading."""
    return GradientStore(path)


def create_store(
    path: Path,
    *,
    manifest: Mapping[str, Any],
    row: np.ndarray,
    tokens: np.ndarray,
    subtask: list[str] | None,
) -> None:
    """Make a store with room for every row and none done; atomic.

    `manifest` must hold `store_dtype`, `proj_dim` and `parameters`, the list of [name, size].
    """
    dtype, dim, count = manifest["store_dtype"], manifest["proj_dim"], len(row)
    width = -(-dim // 8) if dtype == "int1" else dim
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # from 1.10 on attributes may be longer than 64 KiB; the list of a large adapter's parameters is
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            file.attrs["format"] = FORMAT
            file.attrs["version"] = VERSION
            file.attrs["manifest"] = json.dumps(manifest)
            file.attrs["parameters"] = json.dumps(manifest["parameters"])
            _allocate(file, "gradients", (count, width), WIDTH_DTYPE[dtype])
            _allocate(file, "norm", (count,), np.float32)
            _allocate(file, "loss", (count,), np.float32)
            _allocate(file, "done", (count,), np.uint8)
            file["row"] = row.astype(np.int64)
            file["tokens"] = tokens.astype(np.int32)
            if subtask is not None:
                longest = max(len(name.encode()) for name in subtask)
                file.create_dataset(
                    "subtask", data=[n.encode() for n in subtask], dtype=h5py.string_dtype("utf-8", longest)
                )
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataflexError(f"gradient store {path}: cannot be written ({error})") from error
        raise


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """A contiguous dataset whose bytes have their place in the file at once, zeros without being written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal runs make equal bytes, whenever they start
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, properties)


class StoreWriter:
    """Writes rows of an existing store in place. One writing process per file: the second is refused."""

    def __init__(self, path: Path) -> None:
        with GradientStore(path) as store:
            self.dtype, self.dim = store.dtype, store.dim
            self.done = store.done.astype(bool)
            datasets = {name: store._file[name] for name in ("gradients", "norm", "loss", "done")}
            self._places = {name: data.id.get_offset() for name, data in datasets.items()}
            self._strides = {
                name: data.dtype.itemsize * int(np.prod(data.shape[1:], dtype=np.int64))
                for name, data in datasets.items()
            }
        self.path = path
        self._handle = os.open(path, os.O_RDWR)
        try:
            # a record lock: HDF5 itself takes flock locks, and readers must not be kept out
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise UsageError(
                f"gradient store {path}: another process is writing it; wait for it, or name another file"
            ) from None

    def write(self, indices: list[int], vectors: np.ndarray, loss: np.ndarray) -> None:
        """Commit rows: `vectors` [n, k] float32 (made unit here), `loss` [n]; on disk when this returns."""
        norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
        encoded = encode_rows(vectors / norms[:, None], self.dtype)
        try:
            for position, index in enumerate(indices):
                self._put("gradients", index, encoded[position])
                self._put("norm", index, norms[position])
                self._put("loss", index, np.float32(loss[position]))
            os.fdatasync(self._handle)
            for index in indices:
                self._put("done", index, np.uint8(1))
        except OSError as error:
            raise DataflexError(
                f"gradient store {self.path}: {error.strerror}; {int(self.done.sum())} of {len(self.done)} rows are "
                "committed, and the same command goes on from there"
            ) from error
        self.done[indices] = True

    def _put(self, name: str, index: int, value: Any) -> None:
        data = np.ascontiguousarray(value).tobytes()
        place = self._places[name] + index * self._strides[name]
        while data:
            written = os.pwrite(self._handle, data, place)
            data, place = data[written:], place + written

    def close(self) -> None:
        os.fsync(self._handle)
        os.close(self._handle)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
