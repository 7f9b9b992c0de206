"""Locks that keep a second process from writing the same thing at the same time.

Each is an open-file-description lock (Linux) on a whole file. Such a lock belongs to one open handle: it stays when the
same process opens and closes the file elsewhere (a POSIX record lock is dropped then), and the system releases it when
the process ends, however it ends. HDF5's own flock locks do not meet it, so a locked store stays readable.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import warnings
from pathlib import Path
from types import TracebackType

IN_USE = (errno.EACCES, errno.EAGAIN)
NO_SUPPORT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_warned_of: set[int] = set()  # devices: one warning is enough for each


class Lock:
    """A file held open and locked until `close`, or until the process ends. `handle` is its descriptor.

    Args:
        path: the file to lock.
        create: make the file where it is missing.
        wait: wait for another holder to finish.

    Raises:
        BlockingIOError: another holder has the lock and `wait` is false.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, create: bool = True, wait: bool = False) -> None:
        self._owner = os.getpid()
        self.handle = -1
        while self.handle < 0:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
            try:
                _set(handle, fcntl.F_WRLCK, wait, path)
                if _is_at(handle, path):
                    self.handle = handle
            finally:
                if self.handle < 0:
                    os.close(handle)

    def close(self) -> None:
        """Release the lock."""
        handle, self.handle = self.handle, -1
        if handle < 0:
            return
        if os.getpid() == self._owner:  # a forked child shares the lock, and must not release its parent's
            _set(handle, fcntl.F_UNLCK, False, None)
        os.close(handle)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _set(handle: int, kind: int, wait: bool, path: Path | None) -> None:
    """Lock or unlock the whole file. Where its file system has no locks, warn once and go on."""
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # struct flock of 64-bit Linux: type, whence, start, length (0: to the end), pid (0 is required)
            flock = struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, flock)
        else:  # elsewhere, the record lock there is
            operation = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX
            fcntl.lockf(handle, operation if wait or kind == fcntl.F_UNLCK else operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in IN_USE:
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno not in NO_SUPPORT:
            raise
        device = os.fstat(handle).st_dev
        if path is not None and device not in _warned_of:
            _warned_of.add(device)
            warnings.warn(
                f"{path.parent}: its file system has no locks; see to it that no other process writes there meanwhile",
                stacklevel=3,
            )


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` still names the file of `handle`; another process may have replaced it before the lock."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
