"""The safetensors format: read, written, and every damaged header refused."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_safetensors as write_plain

from pyllava.convert.checkpoints.checkpoint import open_file
from pyllava.convert.checkpoints.safetensors_file import check_safetensors, write_safetensors
from pyllava.convert.errors import CheckpointError, OutputError

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(path: Path) -> dict[str, np.ndarray]:
    file, tensors = open_file(path)
    with file:
        return {name: t.rows(0, t.n_rows).reshape(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    write_plain(tmp_path / "x", {"a": X, "b": X[0], "c": np.float32(3).reshape(())}, dtype)
    found = read(tmp_path / "x")
    np.testing.assert_array_equal(found["a"], X)
    assert found["c"].shape == ()
    assert found["c"] == 3


def test_written_files_are_what_the_library_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    library.save_file({"a": X, "b": X.astype(np.float16), "i": np.arange(3)}, tmp_path / "x")
    file, tensors = open_file(tmp_path / "x")
    with file:
        assert {name: t.dtype for name, t in tensors.items()} == {"a": "f32", "b": "f16", "i": "i64"}
        pairs = [("one", tensors["a"]), ("two", tensors["b"])]
        for dtype in ("f32", None):
            with open(tmp_path / "y", "wb") as out:
                write_safetensors(out, pairs, dtype)
            check_safetensors(tmp_path / "y", pairs, dtype)
            back = library.load_file(tmp_path / "y")
            assert back["two"].dtype == (np.float32 if dtype else np.float16)
            np.testing.assert_array_equal(back["two"], X)
        with pytest.raises(OutputError, match="reads back as f16"):
            check_safetensors(tmp_path / "y", pairs, "f32")


def test_changed_output_is_noticed(tmp_path: Path) -> None:
    write_plain(tmp_path / "x", {"a": X}, "f32")
    file, tensors = open_file(tmp_path / "x")
    with file:
        with open(tmp_path / "y", "wb") as out:
            write_safetensors(out, [("a", tensors["a"])], "f32")
        data = bytearray((tmp_path / "y").read_bytes())
        data[-1] ^= 1
        (tmp_path / "y").write_bytes(data)
        with pytest.raises(OutputError, match="reads back differently"):
            check_safetensors(tmp_path / "y", [("a", tensors["a"])], "f32")


TWO = b"\0" * 8
BAD = {
    "length above the cap": (lambda p: raw(p, b"{}", length=100_000_001), "at most 100000000"),
    "length above the file": (lambda p: raw(p, b"{}", length=50), "the file has"),
    "not an object": (lambda p: raw(p, b"[]"), "need '{'"),
    "not utf-8": (lambda p: raw(p, b'{"\xff": 1}'), "header"),
    "not json": (lambda p: raw(p, b'{"a": '), "header"),
    "key twice": (lambda p: raw(p, b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + json.dumps(entry(0, 8)).encode() + b"}", TWO), "twice"),
    "nested": (lambda p: raw(p, b'{"a":' + b"[" * 9 + b"]" * 9 + b"}"), "nested"),
    "nested very deep": (lambda p: raw(p, b'{"a":' + b"[" * 200_000), "nested"),
    "many lists": (lambda p: raw(p, b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "more lists"),
    "unknown dtype": (lambda p: raw(p, {"a": entry(0, 8, dtype="F31")}, TWO), "unknown dtype 'F31'"),
    "dtype a list": (lambda p: raw(p, {"a": entry(0, 8, dtype=["F32"])}, TWO), "unknown dtype"),
    "reversed": (lambda p: raw(p, {"a": entry(8, 0)}, TWO), "data_offsets"),
    "one offset": (lambda p: raw(p, {"a": {**entry(0, 8), "data_offsets": [0]}}, TWO), "data_offsets"),
    "negative": (lambda p: raw(p, {"a": entry(-8, 0)}, TWO), "data_offsets"),
    "float offset": (lambda p: raw(p, {"a": entry(0, 8.0)}, TWO), "data_offsets"),  # type: ignore[arg-type]
    "overlap": (lambda p: raw(p, {"a": entry(0, 8), "b": entry(4, 12)}, TWO + b"\0" * 4), "overlaps"),
    "hole": (lambda p: raw(p, {"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20), "hole"),
    "hole at the start": (lambda p: raw(p, {"a": entry(4, 12)}, b"\0" * 12), "hole"),
    "past the end": (lambda p: raw(p, {"a": entry(0, 8)}, b"\0" * 7), "cut short"),
    "tail": (lambda p: raw(p, {"a": entry(0, 8)}, b"\0" * 9), "after the last tensor"),
    "span too long": (lambda p: raw(p, {"a": entry(0, 8, shape=[1])}, TWO), "needs 4 bytes, has 8"),
    "shape wraps": (lambda p: raw(p, {"a": entry(0, 8, shape=[1 << 62, 4])}, TWO), "needs"),
    "negative shape": (lambda p: raw(p, {"a": entry(0, 8, shape=[-1, -2])}, TWO), "shape"),
    "boolean shape": (lambda p: raw(p, {"a": entry(0, 4, shape=[True])}, b"\0" * 4), "shape"),
    "shape a number": (lambda p: raw(p, {"a": entry(0, 8, shape=2)}, TWO), "shape"),
    "nine dimensions": (lambda p: raw(p, {"a": entry(0, 4, shape=[1] * 9)}, b"\0" * 4), "shape"),
    "huge number": (lambda p: raw(p, b'{"a":' + b"9" * 10_000 + b"}"), "header|exactly"),
    "missing key": (lambda p: raw(p, {"a": {"dtype": "F32", "shape": [2]}}, TWO), "exactly"),
    "extra key": (lambda p: raw(p, {"a": {**entry(0, 8), "x": 1}}, TWO), "exactly"),
    "entry a text": (lambda p: raw(p, {"a": "F32"}, TWO), "exactly"),
    "metadata of numbers": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "table of strings"),
    "too many tensors": (lambda p: raw(p, {str(i): entry(0, 0, shape=[0]) for i in range(65_537)}), "at most 65536"),
    "seven bytes": (lambda p: p.write_bytes(b"\x02" + b"\0" * 6), "at least 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    make, text = BAD[name]
    make(tmp_path / "x.safetensors")
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=text) as caught:
        read(tmp_path / "x.safetensors")
    assert time.perf_counter() - begin < 5
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_brackets_in_names_are_no_nesting(tmp_path: Path) -> None:
    raw(tmp_path / "x", {'a[[[[[[[[[[{{{"\\]': entry(0, 8)}, TWO)
    assert read(tmp_path / "x")['a[[[[[[[[[[{{{"\\]'].shape == (2,)


def test_mutations(tmp_path: Path) -> None:
    """Every byte of a small file flipped, and the file cut everywhere: numbers or a CheckpointError."""
    path = tmp_path / "x"
    write_plain(path, {"a": X, "b": X[:2]}, "f16")
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x21]) + data[i + 1 :])
        with contextlib.suppress(CheckpointError):
            read(path)
        path.write_bytes(data[:i])
        with pytest.raises(CheckpointError):
            read(path)


def test_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    """A checkpoint that shrinks while it is read gives an error, not a signal."""
    path = tmp_path / "x"
    write_plain(path, {"a": X}, "f32")
    file, tensors = open_file(path)
    with file:
        with open(path, "r+b") as out:
            out.truncate(path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="file ended at byte"):
            tensors["a"].rows(0, 4)
