"""Atomic writes: a temporary file beside the target, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from dataflex.errors import DataflexError, UsageError
from dataflex.json_text import iter_objects, json_line, json_of_figures

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

MAX_IN_MEMORY = 1 << 28  # bytes of an array that is not kept in a file


class Digest(Protocol):
    """A hash that bytes are added to, as hashlib makes them."""

    def update(self, data: Any, /) -> None: ...


# What a write fails with through no fault of the program's.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def disk_error(error: BaseException) -> str | None:
    """The system's reason for a failed write, also where a library passes it on as text; None for another error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error.strerror
    text = str(error)
    if "PytorchStreamWriter failed" in text or "file write failed" in text:  # torch does not say why
        text += os.strerror(errno.ENOSPC)
    return next((os.strerror(number) for number in DISK_ERRORS if os.strerror(number) in text), None)


@contextlib.contextmanager
def disk_errors_of(what: str, kept: str = "") -> Iterator[None]:
    """Turn a failed write in the block into a DataflexError that begins with `what` and ends with what is `kept`."""
    try:
        yield
    except DataflexError:
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise DataflexError(f"{what}: {reason}; make room, and the same command goes on{kept}") from error


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None) -> np.ndarray:
    """An array of zeros: in memory, or from MAX_IN_MEMORY bytes on in a nameless file in `folder` (the system's folder
    for temporary files when left out), which goes when the array does."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= MAX_IN_MEMORY:
        return np.zeros(shape, dtype)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors_of("scratch file"), tempfile.TemporaryFile(dir=folder) as handle:
        return np.memmap(handle, dtype, "w+", shape=shape)


@contextlib.contextmanager
def atomic(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an exception."""
    path = Path(path)
    with disk_errors_of(f"cannot write {path}"), _temporary(path, mode) as handle:
        yield handle


@contextlib.contextmanager
def _temporary(path: Path, mode: str) -> Iterator[IO[Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        make_ordinary(Path(temporary))  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def make_ordinary(*paths: Path) -> None:
    """Give files that a library made private the mode that the umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        os.chmod(path, 0o666 & ~umask)


def write_text(path: Path | str, text: str) -> None:
    with atomic(path) as handle:
        handle.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Write the figures of a run; one that is not finite is null. Atomic."""
    write_text(path, json_of_figures(value, indent=2) + "\n")


def write_jsonl(path: Path | str, records: Iterable[Any]) -> None:
    """Write a record a line; a UsageError names the file, the record and the field that JSON cannot hold."""
    with atomic(path) as handle:
        handle.writelines(json_lines(path, records))


def json_lines(path: Path | str, records: Iterable[Any]) -> Iterator[str]:
    """The lines that `write_jsonl` writes; UsageError as there."""
    for number, record in enumerate(records):
        try:
            yield json_line(record) + "\n"
        except UsageError as error:
            raise UsageError(f"{path}, record {number}: {error}") from None


def read_jsonl(path: Path | str, what: str, digest: Digest | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, one a line or in any layout; a UsageError names `what`, the file and the line.

    Args:
        digest: is given the file's bytes as they are read; all of them once the last object was taken.
    """
    try:
        with open_text(path, digest) as handle:
            yield from iter_objects(handle, f"{what} {path}")
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def open_text(path: Path | str, digest: Digest | None = None, newline: str | None = None) -> IO[str]:
    """A file of UTF-8 text, open for reading; `digest` is given its bytes as they are read."""
    if digest is None:
        return open(path, encoding="utf-8-sig", newline=newline)
    raw = io.BufferedReader(_Digested(path, digest), 1 << 20)
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)


class _Digested(io.FileIO):
    """A file whose bytes go to a digest when they are read."""

    def __init__(self, path: Path | str, digest: Digest) -> None:
        super().__init__(path)
        self.digest = digest

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self.digest.update(memoryview(buffer)[: count or 0])
        return count


def check_output_file(path: str | Path, overwrite: bool) -> Path:
    """`path` as one that may be written: not a folder, and not there yet unless `overwrite`."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"output {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UsageError(f"output {path} exists; give --overwrite to replace it, or another name")
    _check_place(path.parent, f"output {path}", "output")
    return path


def check_output_dir(path: str | Path, key: str, overwrite: bool) -> Path:
    """`path` as a folder that may be written: new, empty, or `overwrite`."""
    path = Path(path)
    _check_place(path, f"{key} {path}", key)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{key} {path} is not empty; give --overwrite to start afresh, or another {key}")
    return path


def _check_place(folder: Path, what: str, key: str) -> None:
    """Raise a UsageError unless `folder` is, or can be made, a folder that may be written."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists() or parent.is_symlink())
    if not nearest.is_dir():
        raise UsageError(f"{what}: {nearest} is not a folder; choose another {key}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{what}: no permission to write in {nearest}; choose another {key}")


def check_room(path: str | Path, what: str, wanted: int, instead: str) -> None:
    """Raise a UsageError where the disk of `path`, which may not be there yet, has less than `wanted` bytes free.

    Args:
        what: the output, as the message begins.
        instead: what to change where no room can be made.
    """
    nearest = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
    free = shutil.disk_usage(nearest).free
    if wanted > free:
        raise UsageError(
            f"{what}: {wanted} bytes ({wanted / 1e9:.3g} GB) are needed, and {nearest} has {free} bytes "
            f"({free / 1e9:.3g} GB) free; make room, or {instead}"
        )


def sha256_of(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
