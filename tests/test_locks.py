"""Locks against second processes that are real."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from dataflex import locks
from dataflex.locks import Lock
from dataflex.store.manifest import Manifest
from dataflex.store.reader import GradientStore
from dataflex.store.writer import StoreWriter, create_store

HOLD = """
import sys, time
from pathlib import Path
from dataflex.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""
TRY = """
import sys
from pathlib import Path
from dataflex.locks import Lock
try:
    Lock(Path(sys.argv[1]))
except BlockingIOError:
    sys.exit(3)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def is_free(path: Path) -> bool:
    """Whether another process gets the lock."""
    code = subprocess.run([sys.executable, "-c", TRY, str(path)]).returncode
    assert code in (0, 3)
    return code == 0


@pytest.fixture
def holder(path: Path):
    """A process that holds the lock of `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_one_holder_at_a_time(path: Path, holder: subprocess.Popen):
    with pytest.raises(BlockingIOError):
        Lock(path)
    holder.kill()  # the lock goes with the process
    holder.wait()
    with Lock(path):
        assert not is_free(path)
    assert is_free(path)


def test_waiting_for_the_holder(path: Path, holder: subprocess.Popen):
    got = []
    thread = threading.Thread(target=lambda: got.append(Lock(path, wait=True)))
    thread.start()
    time.sleep(0.2)
    assert got == []
    holder.kill()
    thread.join(10)
    assert not is_free(path)
    got[0].close()


def test_reading_the_file_in_the_process_that_writes_it_keeps_the_lock(path: Path):
    with Lock(path):
        path.read_bytes()
        os.close(os.open(path, os.O_RDWR))
        assert not is_free(path)


def test_two_holders_in_one_process(path: Path):
    with Lock(path), pytest.raises(BlockingIOError):
        Lock(path)
    Lock(path).close()


def test_a_forked_child_neither_keeps_nor_drops_the_lock(path: Path):
    lock = Lock(path)
    child = os.fork()
    if child == 0:
        lock.close()
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    try:
        assert not is_free(path)  # the child has closed its copy
        other = os.fork()
        if other == 0:
            time.sleep(30)
            os._exit(0)
        lock.close()  # while the other child still has the handle
        assert is_free(path)
    finally:
        for process in (child, other):
            os.kill(process, 9)
            os.waitpid(process, 0)


def test_a_file_that_was_replaced_before_the_lock_was_there_is_not_the_one_locked(path: Path, monkeypatch):
    """Look, lock, look again."""
    path.write_text("old")
    true, calls = locks._set, []

    def replaced(handle, kind, wait, named):
        calls.append(kind)
        if calls == [fcntl.F_WRLCK]:
            path.with_suffix(".new").write_text("new")
            os.replace(path.with_suffix(".new"), path)
        true(handle, kind, wait, named)

    monkeypatch.setattr(locks, "_set", replaced)
    with Lock(path, create=False) as lock:
        assert os.read(lock.handle, 9) == b"new"
        assert not is_free(path)


def test_a_file_that_went_is_made_anew_or_is_an_error(path: Path):
    with pytest.raises(FileNotFoundError):
        Lock(path, create=False)
    Lock(path).close()
    assert path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once_and_gone_on_with(path: Path, monkeypatch, number: int):
    def no_locks(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_warned_of", set())
    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.warns(UserWarning, match="its file system has no locks"), Lock(path) as lock:
        os.write(lock.handle, b"written")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lock(path).close()
    assert path.read_bytes() == b"written"


def test_another_error_is_no_lack_of_locks(path: Path, monkeypatch):
    def broken(*arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "fcntl", broken)
    with pytest.raises(OSError, match="broken"):
        Lock(path)


def test_a_store_stays_locked_while_its_writer_reads_it(tmp_path: Path):
    path = tmp_path / "g.h5"
    manifest = Manifest(store_dtype="float32", proj_dim=4, parameters=[["a", 4]])
    create_store(path, manifest=manifest, row=np.arange(3), tokens=np.ones(3), subtask=None)
    with StoreWriter(path) as writer:
        with GradientStore(path) as store:  # opens and closes the file in this process
            assert len(store) == 3
        assert not is_free(path)
        writer.write([1], np.ones((1, 4), np.float32), np.ones(1))
    assert is_free(path)
