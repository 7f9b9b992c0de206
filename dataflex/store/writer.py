"""Making a gradient store, allocated once, and filling it, row by row in place.

All of HDF5's own metadata is final before the first row is written; rows go to their place in the
file as raw bytes, and a row's `done` flag follows only after its data is on disk. So the file opens
with plain h5py at any moment, and a killed run loses at most the rows it had not committed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dataflex.errors import DataflexError, UsageError
from dataflex.files import disk_errors_of
from dataflex.locks import Lock
from dataflex.store.layout import FORMAT, NUMPY_DTYPE, VERSION, ReferenceSum, header_checksum, row_checksums
from dataflex.store.manifest import Manifest
from dataflex.store.reader import GradientStore


def create_store(
    path: Path,
    *,
    manifest: Manifest,
    row: np.ndarray,
    tokens: np.ndarray,
    subtask: list[str] | None,
) -> None:
    """Make a store with room for every row and none done; atomic."""
    with _keeping_writers_out(path):
        with disk_errors_of(f"gradient store {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        freed = 512 * path.stat().st_blocks if path.exists() else 0
        _check_room(path, len(row) * manifest.row_layout.row_bytes - freed)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with disk_errors_of(f"gradient store {path}"):
                _write_empty(temporary, manifest, row, tokens, subtask)
                _put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_empty(
    path: Path, manifest: Manifest, row: np.ndarray, tokens: np.ndarray, subtask: list[str] | None
) -> None:
    text, count = manifest.to_json(), len(row)
    # from 1.10 on attributes may be longer than 64 KiB; the list of a large adapter's parameters is
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["manifest"] = text
        file.attrs["checksum"] = header_checksum(text, row, tokens, subtask)
        file.attrs["parameters"] = json.dumps(manifest.parameters)
        _allocate(file, "gradients", (count, manifest.row_layout.width), NUMPY_DTYPE[manifest.store_dtype])
        _allocate(file, "norm", (count,), np.float32)
        _allocate(file, "loss", (count,), np.float32)
        _allocate(file, "checksum", (count,), np.uint64)
        _allocate(file, "done", (count,), np.uint8)
        if manifest.has_reference:
            _allocate(file, "reference", (2, manifest.proj_dim), np.float64)
            _allocate(file, "reference_state", (2, 3), np.int64)
        file["row"] = row.astype(np.int64)
        file["tokens"] = tokens.astype(np.int32)
        if subtask is not None:
            longest = max(len(name.encode()) for name in subtask)
            file.create_dataset(
                "subtask", data=[n.encode() for n in subtask], dtype=h5py.string_dtype("utf-8", longest)
            )
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _put_in_place(temporary: Path, path: Path) -> None:
    """Name the new store. Where there was none, one that another process has made meanwhile stays."""
    if not path.exists():
        try:
            os.link(temporary, path)
            return
        except FileExistsError:
            raise _in_use(path) from None
        except OSError:
            pass  # a file system without hard links
    os.replace(temporary, path)


def _check_room(path: Path, needed: int) -> None:
    """Raise a DataflexError where the disk has less than `needed` bytes left: rows take theirs as they are written."""
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise DataflexError(
            f"gradient store {path}: {needed / 1e6:.3g} MB are needed and {free / 1e6:.3g} MB are free; make room, "
            "or lower proj_dim, or choose a smaller store_dtype"
        )


def _in_use(path: Path) -> UsageError:
    return UsageError(f"gradient store {path}: another process is writing it; wait for it, or name another file")


def _open_for_writing(path: Path) -> Lock:
    """The store under a lock that keeps other writers out. Readers may come in."""
    try:
        return Lock(path, create=False)
    except BlockingIOError:
        raise _in_use(path) from None
    except OSError as error:
        raise UsageError(f"gradient store {path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def _keeping_writers_out(path: Path) -> Iterator[None]:
    """Hold the lock of a store that is about to be replaced, if there is one."""
    if not path.exists():
        yield
        return
    with _open_for_writing(path):
        yield


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
    """Writes rows of an existing store in place. One writing process per file: the second is refused.

    A batch goes to disk while the next is computed: waiting for a disk takes milliseconds, on a network file system
    far more, and a GPU would wait along.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _open_for_writing(path)
        self._handle = self._lock.handle
        try:
            with GradientStore(path) as store:  # under the lock: before it, another store may have taken its place
                self._rows, self._layout = store.manifest.row_layout, store.file_layout
                self.done = store.done.astype(bool)
                self._turn, self._reference = store.reference_sum
            _check_room(path, self._bytes_to_come())
        except DataflexError:
            self._lock.close()
            raise
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._batch: Future[None] | None = None

    def _bytes_to_come(self) -> int:
        """What the rows that are not done will still take of the disk."""
        status = os.fstat(self._handle)
        holes = status.st_size - 512 * status.st_blocks
        return max(0, min(holes, int((~self.done).sum()) * self._layout.row_bytes))

    def write(
        self,
        indices: list[int],
        vectors: np.ndarray,
        loss: np.ndarray,
        plain: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        """Begin to commit a batch. The caller does not change the arrays afterwards. Waits for the batch before, and
        raises what that one met.

        Args:
            vectors: [n, k] float32; made unit, zeros stay.
            loss: [n].
            plain: [r, k] float32, the plain gradients of the reference rows among them; `weights` [r], 1 when left out.
        """
        self.flush()
        plain = np.zeros((0, vectors.shape[1])) if plain is None else plain
        weights = np.ones(len(plain)) if weights is None else weights
        self._batch = self._thread.submit(self._commit, indices, vectors, loss, plain, weights)

    def flush(self) -> None:
        """Wait until all rows that were given are on disk, and raise what the last batch met."""
        if self._batch is None:
            return
        try:
            self._batch.result()
        finally:
            if self._batch.done():  # or an interruption came first
                self._batch = None

    def _commit(
        self, indices: list[int], vectors: np.ndarray, loss: np.ndarray, plain: np.ndarray, weights: np.ndarray
    ) -> None:
        norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
        lengths = norms[:, None]
        encoded = self._rows.encode(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0))
        checksums = row_checksums(encoded)
        kept = f"; {int(self.done.sum())} of {len(self.done)} rows are committed"
        with disk_errors_of(f"gradient store {self.path}", kept):
            for position, index in enumerate(indices):
                self._put("gradients", index, encoded[position])
                self._put("norm", index, norms[position])
                self._put("loss", index, np.float32(loss[position]))
                self._put("checksum", index, checksums[position])
            self._add_reference(indices, plain, weights)
            os.fdatasync(self._handle)
            for index in indices:
                self._put("done", index, np.uint8(1))
        self.done[indices] = True

    def _add_reference(self, indices: list[int], plain: np.ndarray, weights: np.ndarray) -> None:
        """Write the sum that holds once `indices` are done, beside the one that holds now."""
        if self._reference is None:
            return
        lengths = np.linalg.norm(plain, axis=1)
        good = np.isfinite(lengths) & (lengths > 0)
        units = plain[good] * (weights[good] / lengths[good])[:, None]
        total = self._reference.vector + units.sum(axis=0, dtype=np.float64)
        done = int(self.done.sum() + (~self.done[indices]).sum())
        self._reference = ReferenceSum(total, self._reference.weight + float(weights[good].sum()), done)
        self._turn = 1 - self._turn
        self._put("reference", self._turn, total)
        self._put("reference_state", self._turn, self._reference.state)

    def _put(self, name: str, index: int, value: Any) -> None:
        if name not in self._layout.offset:  # a store of another program's has no checksums
            return
        data = np.ascontiguousarray(value).tobytes()
        offset = self._layout.offset[name] + index * self._layout.stride[name]
        while data:
            written = os.pwrite(self._handle, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        try:
            self.flush()
            with disk_errors_of(f"gradient store {self.path}"):
                os.fsync(self._handle)
        finally:  # not under a batch that an interruption has left at work
            self._thread.submit(self._lock.close)
            self._thread.shutdown()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
