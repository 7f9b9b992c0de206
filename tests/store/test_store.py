"""The store: what goes in comes out, the file is plain HDF5 at any moment, and a killed run is gone on with."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from dataflex.errors import DataflexError, UsageError
from dataflex.store.layout import RowLayout
from dataflex.store.manifest import Manifest
from dataflex.store.reader import open_store
from dataflex.store.writer import StoreWriter, create_store

N, K = 7, 96


def made(path: Path, dtype: str = "float16") -> Path:
    create_store(
        path,
        manifest=Manifest(
            store_dtype=dtype, proj_dim=K, parameters=[["a", 5]], datasets=[["first", 0], ["second", 20]]
        ),
        row=np.array([0, 1, 3, 4, 20, 21, 25]),
        tokens=np.arange(N),
        subtask=["x", "y", "x", "x", "y", "é", "x"],
    )
    return path


def vectors(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32) * 37


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 1 - 1e-7), ("float16", 1 - 1e-6), ("int8", 0.9998), ("int1", 0.7)]
)
def test_rows_come_back_as_unit_vectors(tmp_path, dtype, cosine):
    path, rows = made(tmp_path / "g.h5", dtype), vectors()
    with StoreWriter(path) as writer:
        writer.write([4, 0, 2], rows[[4, 0, 2]], np.array([4.0, 0.5, 2.0]))
        writer.write([1, 3, 5, 6], rows[[1, 3, 5, 6]], np.ones(4))
    with open_store(path) as store:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(np.linalg.norm(store[:], axis=1), 1, rtol=1e-6)
        assert ((store[:] * unit).sum(axis=1) > cosine).all()
        np.testing.assert_allclose(store.norm, np.linalg.norm(rows, axis=1), rtol=1e-6)
        assert store.loss[[4, 0, 2]].tolist() == [4.0, 0.5, 2.0]
        assert store.row.tolist() == [0, 1, 3, 4, 20, 21, 25]
        assert store.subtask == ["x", "y", "x", "x", "y", "é", "x"]
        assert store.dataset == ["first"] * 4 + ["second"] * 3
        np.testing.assert_array_equal(store[2], store[2:3][0])
        store.require_whole()


def test_the_contract_of_the_file(tmp_path):
    path = made(tmp_path / "g.h5", "int1")
    with h5py.File(path) as file:
        assert file.attrs["format"] == "dataflex-gradients"
        assert file.attrs["version"] == 1
        assert json.loads(file.attrs["manifest"])["parameters"] == [["a", 5]]
        assert json.loads(file.attrs["parameters"]) == [["a", 5]]
        shapes = {name: (data.shape, str(data.dtype)) for name, data in file.items() if name != "subtask"}
        assert shapes == {
            "gradients": ((N, K // 8), "uint8"),
            "norm": ((N,), "float32"),
            "loss": ((N,), "float32"),
            "checksum": ((N,), "uint64"),
            "row": ((N,), "int64"),
            "tokens": ((N,), "int32"),
            "done": ((N,), "uint8"),
        }
        assert file["done"][:].tolist() == [0] * N


def test_rows_are_marked_done_one_commit_at_a_time_and_readable_meanwhile(tmp_path):
    path = made(tmp_path / "g.h5")
    with StoreWriter(path) as writer:
        writer.write([5, 1], vectors()[[5, 1]], np.ones(2))
        writer.flush()
        with h5py.File(path) as file:  # plain h5py, while the writer is at work
            assert file["done"][:].tolist() == [0, 1, 0, 0, 0, 1, 0]
            assert np.abs(file["gradients"][1]).max() > 0
    with open_store(path) as store, pytest.raises(UsageError, match=r"5 of 7 rows are not done \(first: row 0\)"):
        store.require_whole()


def test_a_batch_goes_to_disk_behind_the_caller_and_is_done_only_then(tmp_path, monkeypatch):
    path, disk = made(tmp_path / "g.h5"), threading.Event()
    to_disk = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda handle: (disk.wait(), to_disk(handle)))
    with StoreWriter(path) as writer:
        writer.write([0], vectors()[:1], np.ones(1))
        assert not writer.done.any()
        with open_store(path) as store:
            assert not store.done.any()
        disk.set()
        writer.write([3], vectors()[3:4], np.ones(1))
        assert writer.done[0]
    with open_store(path) as store:
        assert store.done.tolist() == [1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("then", ["write", "flush", "close"])
def test_what_the_disk_said_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    path = made(tmp_path / "g.h5")
    writer = StoreWriter(path)
    writer.write([0], vectors()[:1], np.ones(1))
    writer.flush()
    monkeypatch.setattr(os, "fdatasync", full_disk)
    writer.write([1], vectors()[1:2], np.ones(1))
    calls = {"write": lambda: writer.write([2], vectors()[2:3], np.ones(1)), "flush": writer.flush}
    with pytest.raises(DataflexError, match="1 of 7 rows are committed"):
        calls.get(then, writer.close)()
    if then != "close":
        monkeypatch.undo()
        writer.close()
    with open_store(path) as store:
        assert store.done.tolist() == [1, 0, 0, 0, 0, 0, 0]


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_second_writer_is_refused(tmp_path):
    path = made(tmp_path / "g.h5")
    code = f"from dataflex.store import writer as s\ns.StoreWriter(s.Path({str(path)!r}))"
    with StoreWriter(path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing it" in second.stderr
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (third.returncode, third.stderr) == (0, "")


def test_a_long_parameter_list_fits(tmp_path):
    parameters = [[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight", 4096] for i in range(3000)]
    create_store(
        tmp_path / "g.h5",
        manifest=Manifest(store_dtype="float16", proj_dim=8, parameters=parameters),
        row=np.arange(2),
        tokens=np.arange(2),
        subtask=None,
    )
    with open_store(tmp_path / "g.h5") as store:
        assert store.manifest["parameters"] == parameters
        assert store.subtask is None


@pytest.mark.parametrize("content", [b"", b"no HDF5", None])
def test_what_is_no_store_is_refused(tmp_path, content):
    path = tmp_path / "g.h5"
    if content is None:
        with h5py.File(path, "w") as file:
            file["other"] = np.arange(3)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"g\.h5"):
        open_store(path)
    with pytest.raises(UsageError, match="no such file"):
        open_store(tmp_path / "missing.h5")


def test_nothing_is_left_when_a_store_cannot_be_made(tmp_path):
    with pytest.raises(TypeError):
        create_store(
            tmp_path / "g.h5",
            manifest=Manifest(store_dtype="float16", proj_dim=8, parameters=object()),
            row=np.arange(2),
            tokens=np.arange(2),
            subtask=None,
        )
    assert list(tmp_path.iterdir()) == []


def test_encoding_keeps_the_sign_and_the_scale_of_each_row():
    rows = np.array([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0]], dtype=np.float32)
    assert RowLayout("int8", 3).encode(rows).tolist() == [[95, -127, 0], [127, 0, 0]]
    signs = RowLayout("int1", 3)
    assert signs.encode(rows).tolist() == [[0b10100000], [0b11100000]]
    np.testing.assert_allclose(signs.decode(signs.encode(rows))[0], np.array([1, -1, 1]) / 3**0.5)


def test_the_sum_over_reference_rows_goes_on_after_any_cut(tmp_path):
    """However a run was cut off between a batch's first byte and its last done flag, the finished file is the same."""
    random = np.random.default_rng(0)
    batches = [([4, 0, 2], 2), ([1, 3], 0), ([5, 6, 7], 3), ([8], 1)]
    plain = [random.normal(size=(references, K)).astype(np.float32) for _, references in batches]
    rows = random.normal(size=(9, K)).astype(np.float32)

    def make(path):
        manifest = Manifest("float32", K, settings={"contrast": "pool"})
        create_store(path, manifest=manifest, row=np.arange(9), tokens=np.ones(9), subtask=None)

    def write(path, numbers):
        with StoreWriter(path) as writer:
            for number in numbers:
                indices = batches[number][0]
                writer.write(indices, rows[indices], np.ones(len(indices)), plain[number])

    def flip(path, indices, value):
        with h5py.File(path, "r+") as file:
            file["done"][indices] = value

    uncut = tmp_path / "uncut.h5"
    make(uncut)
    write(uncut, range(4))
    wanted = np.concatenate([(part / np.linalg.norm(part, axis=1, keepdims=True)) for part in plain]).mean(axis=0)
    np.testing.assert_allclose(open_store(uncut).reference, wanted, atol=1e-6)
    for last in range(4):
        for undone in ([], batches[last][0], batches[last][0][1:]):
            path = tmp_path / f"{last}{len(undone)}.h5"
            make(path)
            write(path, range(last + 1))
            flip(path, sorted(undone), 0)
            write(path, range(last if undone else last + 1, 4))
            assert open_store(path).reference.tobytes() == open_store(uncut).reference.tobytes()


def test_a_damaged_sum_over_reference_rows_is_told(tmp_path):
    path = tmp_path / "t.h5"
    create_store(
        path,
        manifest=Manifest("float32", K, settings={"contrast": 1}),
        row=np.arange(2),
        tokens=np.ones(2),
        subtask=None,
    )
    with pytest.raises(UsageError, match="no reference row"):
        _ = open_store(path).reference
    with StoreWriter(path) as writer:
        writer.write([0, 1], np.eye(2, K, dtype=np.float32), np.ones(2), np.eye(1, K, dtype=np.float32))
    with h5py.File(path, "r+") as file:
        file["reference"][:] = 0
    with pytest.raises(UsageError, match="sum over its reference rows"):
        _ = open_store(path).reference
