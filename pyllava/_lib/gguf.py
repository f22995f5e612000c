"""GGUF files: their metadata and tensor tables."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass

import numpy as np

from .functions import _P, _U64, _Kv, _TensorInfo
from .handle import _Handle
from .load import _check, lib
from .values import _path

_NUMPY_TYPES = ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file; `shape` row-major, slowest first; `offset` in bytes from its start."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int


class GgufHandle:
    """A parsed GGUF file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        address = _P()
        _check(lib.pyllava_gguf_open(_path(path), c.byref(address)))
        self._handle = _Handle("pyllava_gguf_free", address.value)

    def close(self) -> None:
        self._handle.close()

    def header(self) -> tuple[int, int]:
        """Version and alignment."""
        with self._handle.use() as at:
            return int(lib.pyllava_gguf_version(at)), int(lib.pyllava_gguf_alignment(at))

    def metadata(self) -> dict[str, object]:
        with self._handle.use() as at:
            return _metadata(at)

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


def _string(file: int, i: int, item: int) -> str:
    text, size = _P(), _U64()
    _check(lib.pyllava_gguf_string(file, i, item, c.byref(text), c.byref(size)))
    return c.string_at(text.value or 0, size.value).decode(errors="replace") if size.value else ""


def _metadata(file: int) -> dict[str, object]:
    kv, found = _Kv(), {}
    for i in range(lib.pyllava_gguf_n_kv(file)):
        _check(lib.pyllava_gguf_kv(file, i, c.byref(kv)))
        values: list[object]
        if kv.item_type == 8:
            values = [_string(file, i, item) for item in range(kv.n)]
        else:
            dtype = np.dtype(_NUMPY_TYPES[kv.item_type])
            raw = c.string_at(kv.data, kv.n * dtype.itemsize) if kv.n else b""
            values = list(np.frombuffer(raw, dtype).tolist())
        found[kv.key.decode()] = values if kv.type == 9 else values[0]
    return found
