"""GGUF files: their metadata and tensor tables."""

from __future__ import annotations

import ctypes as c
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelFileError
from .functions import _P, _U64, _Kv, _TensorInfo
from .handle import _Handle
from .load import _check, lib
from .values import _path

_NUMPY_TYPES = ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"]
_STRING, _ARRAY = 8, 9  # of a key's types


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file; `shape` row-major, slowest first; `offset` in bytes from its start."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int


class Metadata(Mapping[str, object]):
    """The keys of a GGUF file. A value is read when it is asked for: int, float, bool, str, for an array of numbers a
    NumPy array, for one of texts a list of str.

    The file stays open as long as this object. Raises ClosedError where what owns the file was closed, and
    ModelFileError where the file was changed in its place since it was opened.
    """

    def __init__(
        self, handle: _Handle, file: Callable[[int], int], unchanged: Callable[[], None] = lambda: None
    ) -> None:
        self._handle, self._file, self._unchanged = handle, file, unchanged
        self._index: dict[str, int] | None = None

    def _numbers(self) -> dict[str, int]:
        """The number of each key."""
        if self._index is None:
            kv, found = _Kv(), {}
            with self._handle.use() as at:
                file = self._file(at)
                for i in range(lib.pyllava_gguf_n_kv(file) if file else 0):
                    _check(lib.pyllava_gguf_kv(file, i, c.byref(kv)))
                    found[kv.key.decode()] = i
            self._index = found
        return self._index

    def __getitem__(self, key: str) -> object:
        i = self._numbers()[key]
        self._unchanged()
        with self._handle.use() as at:
            return _value(self._file(at), i)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers()

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers())

    def __len__(self) -> int:
        return len(self._numbers())

    def __repr__(self) -> str:
        return f"<metadata: {len(self)} keys>"

    def small(self, max_items: int = 1024) -> dict[str, object]:
        """A copy of all values but long arrays, which outlives the file."""
        kv, found = _Kv(), {}
        with self._handle.use() as at:
            file = self._file(at)
            for key, i in self._numbers().items():
                _check(lib.pyllava_gguf_kv(file, i, c.byref(kv)))
                if kv.n <= max_items:
                    found[key] = _value(file, i)
        return found


class GgufHandle:
    """A parsed GGUF file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        address = _P()
        _check(lib.pyllava_gguf_open(_path(path), c.byref(address)))
        self._handle = _Handle("pyllava_gguf_free", address.value)
        self._unchanged = _watch(path)

    def close(self) -> None:
        self._handle.close()

    def header(self) -> tuple[int, int]:
        """Version and alignment."""
        with self._handle.use() as at:
            return int(lib.pyllava_gguf_version(at)), int(lib.pyllava_gguf_alignment(at))

    def metadata(self) -> Metadata:
        return Metadata(self._handle, lambda at: at, self._unchanged)

    def tensors(self) -> list[TensorInfo]:
        info, found = _TensorInfo(), []
        with self._handle.use() as at:
            for i in range(lib.pyllava_gguf_n_tensors(at)):
                _check(lib.pyllava_gguf_tensor(at, i, c.byref(info)))
                shape = tuple(info.shape[: info.n_dims])
                name, kind = info.name.decode(), info.type.decode()
                found.append(TensorInfo(name, kind, shape, info.size, info.offset))
        return found

    def records(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each key-value pair in the file."""
        kv, offset, size, found = _Kv(), _U64(), _U64(), {}
        with self._handle.use() as at:
            for i in range(lib.pyllava_gguf_n_kv(at)):
                _check(lib.pyllava_gguf_kv(at, i, c.byref(kv)))
                _check(lib.pyllava_gguf_record(at, i, c.byref(offset), c.byref(size)))
                found[kv.key.decode()] = (offset.value, size.value)
        return found


def _watch(path: str | os.PathLike[str]) -> Callable[[], None]:
    """Raises where the file has become another since this call: what is mapped must not be read then.

    A file that was put in its place, or that is gone, is no such change: the mapped one is still whole.
    """
    path = os.path.abspath(os.fspath(path))
    before = os.stat(path)

    def unchanged() -> None:
        try:
            now = os.stat(path)
        except OSError:
            return
        same_file = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
        if same_file and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ModelFileError(f"{path}: has been changed since it was opened")

    return unchanged


def _string(file: int, i: int) -> str:
    text, size = _P(), _U64()
    _check(lib.pyllava_gguf_string(file, i, 0, c.byref(text), c.byref(size)))
    return c.string_at(text.value or 0, size.value).decode(errors="replace") if size.value else ""


def _strings(file: int, i: int, kv: _Kv) -> list[str]:
    """The texts of an array, which lie one after the other in the file, each behind its size in 8 bytes."""
    if not kv.n:
        return []
    first, size, offset, n_bytes = _P(), _U64(), _U64(), _U64()
    _check(lib.pyllava_gguf_string(file, i, 0, c.byref(first), c.byref(size)))
    _check(lib.pyllava_gguf_record(file, i, c.byref(offset), c.byref(n_bytes)))
    before = 8 + len(kv.key) + 4 + 4 + 8  # the key, its type, the type of items and how many they are
    data = _copy((first.value or 0) - 8, n_bytes.value - before).tobytes()
    found, at = [], 0
    for _ in range(kv.n):
        (n,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 8 : at + 8 + n].decode(errors="replace"))
        at += 8 + n
    return found


def _copy(address: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    if not n_bytes:
        return np.empty(0, np.uint8)
    memory: Any = (c.c_ubyte * n_bytes).from_address(address)
    return np.array(np.frombuffer(memory, np.uint8))


def _value(file: int, i: int) -> object:
    kv = _Kv()
    _check(lib.pyllava_gguf_kv(file, i, c.byref(kv)))
    if kv.item_type == _STRING:
        return _strings(file, i, kv) if kv.type == _ARRAY else _string(file, i)
    dtype = np.dtype(_NUMPY_TYPES[kv.item_type])
    values = _copy(kv.data or 0, kv.n * dtype.itemsize).view(dtype)
    return values if kv.type == _ARRAY else values[0].item()
