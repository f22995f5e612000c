"""A tensor of a checkpoint that stays in its file: name, type, shape, and rows on demand.

Rows are fetched with positioned reads, not through a memory map: mapped pages would count as ours until the
system takes them back, and a file cut short under a map ends the process with SIGBUS, where a short read is
an error with a name.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import CheckpointError, shown
from .dtypes import FLOATS, STORED, AnyArray, FloatArray, to_f32

CHUNK_ELEMENTS = 4 << 20  # elements handled at once: 16 MiB of float32
MAX_ROW_BYTES = 1 << 30  # a longer row, or a wider span of a strided view, is refused rather than read


class InputFile:
    """A regular file, open for positioned reads. Not for use from two threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mode = os.stat(path).st_mode  # before open(): opening a FIFO would wait for a writer
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: not a regular file")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, n_bytes: int) -> bytearray:
        """Exactly `n_bytes` from `offset`; CheckpointError where the file ends before that."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise CheckpointError(
                f"{self.path}: needs bytes {offset}..{offset + n_bytes}, file has {self.size}"
            )
        data = bytearray(n_bytes)
        view = memoryview(data)
        self._file.seek(offset)
        done = 0
        while done < n_bytes:
            try:
                got = self._file.readinto(view[done:])
            except OSError as error:
                error.filename = str(self.path)
                raise
            if not got:
                raise CheckpointError(
                    f"{self.path}: file ended at byte {offset + done}, {n_bytes - done} more needed"
                )
            done += got
        return data

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class Tensor:
    """`shape` is row-major, slowest first; `strides` count elements; `offset` is the byte of element 0 in
    `file`.

    Whoever builds one has checked that every element lies inside the file.
    """

    name: str
    dtype: str  # a key of dtypes.STORED
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: InputFile
    offset: int

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED[self.dtype].itemsize

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) under a name of their own."""
        first = self.offset + start * self.strides[0] * STORED[self.dtype].itemsize
        return replace(self, name=name, shape=(stop - start, *self.shape[1:]), offset=first)

    def stored_rows(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop) as stored (bf16 as 16-bit integers): [stop - start, row_elements]."""
        kind = STORED[self.dtype]
        shape = (stop - start, *self.shape[1:])
        strides = self.strides or (1,)
        first = self.offset + start * strides[0] * kind.itemsize
        if math.prod(shape) == 0:
            return np.zeros((shape[0], self.row_elements), dtype=kind)
        span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        if max(span, math.prod(shape)) * kind.itemsize > MAX_ROW_BYTES:
            raise CheckpointError(
                f"{shown(self.name)}: rows of {span * kind.itemsize} bytes are too long to convert"
            )
        flat = np.frombuffer(self.file.read(first, span * kind.itemsize), dtype=kind)
        if strides != row_major(shape):
            flat = np.lib.stride_tricks.as_strided(flat, shape, tuple(s * kind.itemsize for s in strides))
        return flat.reshape(stop - start, self.row_elements)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows [start, stop) as float32 [stop - start, row_elements]; a scalar counts as one row."""
        if self.dtype not in FLOATS:
            raise CheckpointError(f"{shown(self.name)}: type {self.dtype}, need one of {', '.join(FLOATS)}")
        return to_f32(self.stored_rows(start, stop), self.dtype)


@dataclass(frozen=True)
class Adapted(Tensor):
    """A matrix with a LoRA adapter merged into it as its rows are read: W + scale * up @ down."""

    down: FloatArray  # [rank, row_elements]
    up: Tensor  # [n_rows, rank]
    scale: float

    def rows(self, start: int, stop: int) -> FloatArray:
        """As those of `Tensor`."""
        change = self.up.rows(start, stop).astype(np.float64) @ self.down.astype(np.float64)
        return np.asarray(super().rows(start, stop) + self.scale * change, np.float32)


@dataclass(frozen=True)
class Computed:
    """A vector that no checkpoint holds, where one of its tensors is expected."""

    name: str
    values: FloatArray  # [n]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def row_elements(self) -> int:
        return 1

    def rows(self, start: int, stop: int) -> FloatArray:
        """As those of `Tensor`."""
        return self.values[start:stop].reshape(-1, 1)


def chunks(n_rows: int, row_elements: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a tensor, each about CHUNK_ELEMENTS and starting at a multiple of `multiple`."""
    step = max(CHUNK_ELEMENTS // max(row_elements, 1) // multiple, 1) * multiple
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)
