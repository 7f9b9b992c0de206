"""Reading a gradient store: rows as unit vectors, some at a time, and whether the file is as it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dataflex.errors import UsageError
from dataflex.store.layout import FORMAT, VERSION, FileLayout, ReferenceSum, header_checksum, row_checksums
from dataflex.store.manifest import Manifest

SHOWN = ("split", "gradient_type", "adam_formula", "projector", "step", "learning_rate", "template")
"""What a store came from, as its `repr` tells it."""
TILE_FLOATS = 1 << 20  # 4 MiB of float32
WRITTEN = np.dtype([("row", np.int64), ("done", np.uint8), ("norm", np.float32), ("checksum", np.uint64)])


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
            self.manifest = Manifest.from_json(attributes["manifest"])
            self._rows = self.manifest.row_layout
            self._has_checksums = "checksum" in self._file
            self.row: np.ndarray = self._file["row"][:]
            self.tokens: np.ndarray = self._file["tokens"][:]
            self.subtask: list[str] | None = (
                self._file["subtask"].asstr()[:].tolist() if "subtask" in self._file else None
            )
            checksum = header_checksum(attributes["manifest"], self.row, self.tokens, self.subtask)
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

    def __repr__(self) -> str:
        """Its shape and what it came from."""
        shown = self.manifest.summary()
        origin = ", ".join(f"{name} {shown[name]}" for name in SHOWN if name in shown)
        return f"GradientStore {self.path}: {len(self)} rows of {self.dim} {self.manifest.store_dtype}; {origin}"

    @property
    def dim(self) -> int:
        """k, the width of a row."""
        return self.manifest.proj_dim

    @property
    def file_layout(self) -> FileLayout:
        """Where the rows lie in the file."""
        return FileLayout.of(self._file)

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
        starts = self.manifest.datasets
        if len(starts) < 2:
            return None
        numbers = np.searchsorted([row for _, row in starts], self.row, side="right") - 1
        return [starts[number][0] for number in numbers]

    @property
    def reference_sum(self) -> tuple[int, ReferenceSum | None]:
        """The sum over the reference rows that are done, None for a store without one, and which of the two sums in the
        file it is.

        Raises:
            UsageError: where its bytes are not those that were written.
        """
        if not self.manifest.has_reference:
            return 0, None
        done, states = int(self.done.sum()), self._file["reference_state"][:]
        turn = max((0, 1), key=lambda turn: states[turn, 0] if states[turn, 0] <= done else 0)
        if not 0 < states[turn, 0] <= done:  # no batch is done
            return 1, ReferenceSum(np.zeros(self.dim), 0.0, 0)
        weight = float(states[turn, 1:2].view(np.float64)[0])
        found = ReferenceSum(self._file["reference"][turn], weight, int(states[turn, 0]))
        if not np.array_equal(found.state, states[turn]):
            raise UsageError(
                f"gradient store {self.path}: damaged, the sum over its reference rows is not the one that was "
                "written; write the store again with --overwrite"
            )
        return turn, found

    @property
    def reference(self) -> np.ndarray:
        """[k] float32: the mean unit plain gradient of the rows that `contrast` names.

        Raises:
            UsageError: for a store that was collected without `contrast`, or where each of these rows is bad.
        """
        _, total = self.reference_sum
        if total is None:
            raise UsageError(
                f"gradient store {self.path}: it was collected without contrast; collect the training rows with "
                "contrast=pool, or leave contrast out"
            )
        if not total.weight:
            raise UsageError(f"gradient store {self.path}: no reference row of it has a gradient; use another contrast")
        return (total.vector / total.weight).astype(np.float32)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Unit rows, [n, k] float32 ([k] for a single index)."""
        if isinstance(rows, (int, np.integer)):
            index = range(len(self))[rows]
            return self[index : index + 1][0]
        stored = self._file["gradients"][rows]
        self._require_intact(stored, self._written(rows))
        decoded = self._rows.decode(stored)
        if self.manifest.store_dtype == "int1":  # signs have no zero
            decoded[self._file["norm"][rows] == 0] = 0
        return decoded

    def tiles(self, start: int, stop: int, max_floats: int = TILE_FLOATS) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, rows [n, k] float32 in whatever length they are kept) from `start` to `stop`, tile by tile.

        A tile lies in one buffer, small enough for a core's cache: use it before the next. Threads may each have
        tiles of their own; the bytes are read past HDF5, which lets one thread in at a time.

        Raises:
            UsageError: naming the first row whose bytes are not those it was written with.
        """
        data = self._file["gradients"]
        count = max(1, max_floats // self.dim)
        floats = np.empty((count, self.dim), dtype=np.float32)
        raw = np.empty((count, *data.shape[1:]), dtype=data.dtype)
        offset, stride = data.id.get_offset(), raw[0].nbytes
        written = self._written(slice(start, stop))  # once: HDF5 lets one thread in at a time
        with open(self.path, "rb", buffering=0) as handle:
            for first in range(start, stop, count):
                rows = min(count, stop - first)
                if offset is None:  # another program has packed the file
                    data.read_direct(raw, np.s_[first : first + rows], np.s_[:rows])
                else:
                    _read_fully(handle.fileno(), raw[:rows], offset + first * stride)
                self._require_intact(raw[:rows], written[first - start : first - start + rows])
                self._rows.to_float(raw[:rows], floats[:rows])
                yield first, floats[:rows]

    def _written(self, rows: Any) -> np.ndarray:
        """[n] records: row number, done flag, norm, and the checksum that was written (0 where there are none)."""
        row = self.row[rows]
        written = np.zeros(len(row), dtype=WRITTEN)
        written["row"], written["done"], written["norm"] = row, self._file["done"][rows], self._file["norm"][rows]
        if self._has_checksums:
            written["checksum"] = self._file["checksum"][rows]
        return written

    def _require_intact(self, stored: np.ndarray, written: np.ndarray) -> None:
        damaged = self._damaged(stored, written)
        if damaged.any():
            raise UsageError(
                f"gradient store {self.path}: damaged, the gradient of row {written['row'][damaged][0]} is not the one "
                "that was written; write the store again with --overwrite"
            )

    def _damaged(self, stored: np.ndarray, written: np.ndarray) -> np.ndarray:
        """[n] bool: which of the `stored` rows are done and not as they were `written`.

        A store that another program made has no checksums: there a vector of zeros tells, if its norm is not zero.
        """
        done = written["done"] == 1
        if not self._has_checksums:
            return done & (written["norm"] > 0) & ~stored.any(axis=1) & (self.manifest.store_dtype != "int1")
        return done & (row_checksums(stored) != written["checksum"])

    def damaged_rows(self) -> list[int]:
        """Numbers of the rows that are done and whose bytes are not those they were written with. Reads the whole
        file."""
        damaged: list[int] = []
        step = max(1, TILE_FLOATS // self.dim)
        for start in range(0, len(self), step):
            written = self._written(slice(start, start + step))
            stored = self._file["gradients"][start : start + step]
            damaged += written["row"][self._damaged(stored, written)].tolist()
        return damaged

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


def _read_fully(handle: int, into: np.ndarray, offset: int) -> None:
    """Fill an array from an offset in a file. Raises an OSError where the file ends before it is full."""
    room = memoryview(into.reshape(-1).view(np.uint8).data)
    while room:
        got = os.preadv(handle, [room], offset)
        if not got:
            raise OSError("the file ends too early")
        room, offset = room[got:], offset + got


def open_store(path: str | Path) -> GradientStore:
    """Open a gradient store for reading."""
    return GradientStore(path)
