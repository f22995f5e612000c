"""A GGUF file written as a stream: header through the `gguf` package, tensors chunk by chunk, then read back
and checked.

The file appears under its name only after every number in it has been compared with its source (RELIABILITY
section 4).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGUFValueType as Kind

from .._part_file import replacing
from .._terminal import byte_bar
from ..formats import BF16, F16, F32, GgmlType
from .checkpoints.dtypes import FloatArray
from .checkpoints.tensor import Computed, InputFile, Tensor, chunks
from .encoding import agrees, decode, encode
from .errors import CheckpointError, ConvertError, OutputError, shown
from .script import log

MAX_NAME = 63
# Read back at the start, in the middle and at the end of a tensor of those types that pyllava quantises.
SAMPLE_ROWS = 64
ALIGNMENT = 32


def valid_text(text: str) -> str:
    """`text` without the lone surrogates that JSON and file names can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass
class Metadata:
    """Typed key-value pairs in file order, after `general.architecture`."""

    architecture: str
    values: dict[str, tuple[Kind, Kind | None, Any]] = field(default_factory=dict)

    def u32(self, key: str, value: int) -> None:
        self.values[key] = (Kind.UINT32, None, value)

    def f32(self, key: str, value: float) -> None:
        self.values[key] = (Kind.FLOAT32, None, value)

    def flag(self, key: str, value: bool) -> None:
        self.values[key] = (Kind.BOOL, None, value)

    def text(self, key: str, value: str) -> None:
        self.values[key] = (Kind.STRING, None, valid_text(value))

    def i32s(self, key: str, values: Sequence[int]) -> None:
        self._array(key, Kind.INT32, values)

    def f32s(self, key: str, values: Sequence[float]) -> None:
        self._array(key, Kind.FLOAT32, values)

    def texts(self, key: str, values: Sequence[str]) -> None:
        self._array(key, Kind.STRING, [valid_text(value) for value in values])

    def _array(self, key: str, kind: Kind, values: Sequence[Any]) -> None:
        if values:  # GGUF readers dislike empty arrays; an absent key says the same
            self.values[key] = (Kind.ARRAY, kind, list(values))


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write; `shape` is row-major. `reorder` maps rows to rows, `multiple` at a time."""

    name: str
    source: Tensor | Computed
    shape: tuple[int, ...]
    kind: GgmlType
    reorder: Callable[[FloatArray], FloatArray] | None = None
    multiple: int = 1

    @property
    def n_rows(self) -> int:
        return self.source.n_rows

    @property
    def n_bytes(self) -> int:
        return self.kind.n_bytes(math.prod(self.shape))

    def chunks(self) -> Iterable[tuple[int, int]]:
        return chunks(self.n_rows, self.source.row_elements, self.multiple)

    def checked(self) -> Iterable[tuple[int, int]]:
        """The row ranges that are read back: all, but samples where unpacking costs more than writing did."""
        if not self.kind.step:
            return self.chunks()
        step = -(-SAMPLE_ROWS // self.multiple) * self.multiple
        last = (self.n_rows - 1) // self.multiple * self.multiple
        starts = {0, self.n_rows // 2 // self.multiple * self.multiple, max(last - step + self.multiple, 0)}
        return [(start, min(start + step, self.n_rows)) for start in sorted(starts)]

    def rows(self, start: int, stop: int) -> FloatArray:
        """The wanted numbers of rows [start, stop): float32 [stop - start, row_elements], all finite."""
        x = self.source.rows(start, stop)
        if not np.isfinite(x).all():
            raise CheckpointError(f"{shown(self.source.name)}: holds NaN or infinity in rows {start}..{stop}")
        return x if self.reorder is None else self.reorder(x)


def write_gguf(
    path: Path, metadata: Metadata, tensors: Sequence[OutTensor], *, inputs: Iterable[Path]
) -> None:
    """Write, check and rename.

    Whatever is raised (OutputError, CheckpointError, ValueError, OSError), no file is left behind.
    """
    with written(path, metadata, tensors, inputs=inputs):
        pass


@contextlib.contextmanager
def written(
    path: Path, metadata: Metadata, tensors: Sequence[OutTensor], *, inputs: Iterable[Path]
) -> Iterator[Path]:
    """Write `<path>.part`, check it and yield it; renamed when the block ends well, else removed."""
    _check_plan(tensors)
    n_bytes = sum(tensor.n_bytes + ALIGNMENT for tensor in tensors) + (16 << 20)
    with replacing(path, n_bytes=n_bytes, inputs=inputs) as file:
        part = Path(file.name)
        with byte_bar("writing", n_bytes) as tick:
            _write(part, metadata, tensors, tick)
        with byte_bar("checking", n_bytes) as tick:
            check_gguf(part, metadata, tensors, tick)
        how = "read back in samples" if any(tensor.kind.step for tensor in tensors) else "read back"
        size = part.stat().st_size / 1e6
        log.info("%s: %d tensors, %.1f MB, %s and compared", path, len(tensors), size, how)
        yield part


def _check_plan(tensors: Sequence[OutTensor]) -> None:
    names = set()
    for tensor in tensors:
        if tensor.name in names or not 0 < len(tensor.name.encode()) <= MAX_NAME:
            raise OutputError(
                f"{shown(tensor.name)}: tensor names must be unique and at most {MAX_NAME} bytes"
            )
        names.add(tensor.name)
        if math.prod(tensor.shape) != math.prod(tensor.source.shape) or not math.prod(tensor.shape):
            raise OutputError(
                f"{tensor.name}: {list(tensor.source.shape)} cannot be written as {list(tensor.shape)}"
            )
        if tensor.shape[-1] % tensor.kind.block:
            raise OutputError(
                f"{tensor.name}: rows of {tensor.shape[-1]} do not divide into {tensor.kind} blocks"
            )


def _write(
    part: Path, metadata: Metadata, tensors: Sequence[OutTensor], tick: Callable[[int], object]
) -> None:
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(part, metadata.architecture)
    try:
        for key, (kind, element, value) in metadata.values.items():
            writer.add_key_value(key, value, kind, sub_type=element)
        for tensor in tensors:
            dtype, raw = np.dtype(np.float32), gguf.GGMLQuantizationType(tensor.kind.id)
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.n_bytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        _pad(out)
        for tensor in tensors:
            _write_tensor(out, tensor, tick)
            _pad(out)
        out.flush()
    finally:
        writer.close()


def _write_tensor(out: BinaryIO, tensor: OutTensor, tick: Callable[[int], object]) -> None:
    log.debug("%-40s %-5s %s", tensor.name, tensor.kind, list(tensor.shape))
    begin = out.tell()
    for start, stop in tensor.chunks():
        x = tensor.rows(start, stop)
        if tensor.kind.block > 1:
            x = x.reshape(-1, tensor.shape[-1])
        try:
            data = encode(x, tensor.kind)
        except ConvertError as error:
            raise CheckpointError(f"{shown(tensor.source.name)}: {error}") from None
        if tensor.kind in (F16, BF16) and not np.isfinite(decode(data.tobytes(), 1, tensor.kind)).all():
            biggest = float(np.abs(x).max())
            raise CheckpointError(
                f"{tensor.source.name}: {biggest:g} does not fit {tensor.kind}, use f32 for this file"
            )
        out.write(data.tobytes())
        tick(data.nbytes)
    if out.tell() - begin != tensor.n_bytes:
        raise OutputError(f"{tensor.name}: wrote {out.tell() - begin} bytes, need {tensor.n_bytes}")


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def check_gguf(
    path: Path,
    metadata: Metadata,
    tensors: Sequence[OutTensor],
    tick: Callable[[int], object] = lambda _: None,
) -> None:
    """Read a written file back and compare keys, shapes, types and every number with what was meant."""
    places = _check_header(path, metadata, tensors)
    gc.collect()  # the reader's memory map goes; the numbers are read without one
    with InputFile(path) as file:
        for tensor in tensors:
            _check_tensor(file, places[tensor.name], tensor)
            tick(tensor.n_bytes)


def _check_header(path: Path, metadata: Metadata, tensors: Sequence[OutTensor]) -> dict[str, int]:
    """Keys, names, shapes and types, through the package's reader; returns where each tensor begins."""
    reader = gguf.GGUFReader(path)
    _check_metadata(path, reader, metadata)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if set(found) != {tensor.name for tensor in tensors}:
        raise OutputError(f"{path}: holds {len(found)} tensors, wrote {len(tensors)}")
    for tensor in tensors:
        entry = found[tensor.name]
        shape = tuple(int(n) for n in reversed(entry.shape.tolist()))
        if shape != tensor.shape or int(entry.tensor_type) != tensor.kind.id:
            raise OutputError(f"{path}: {tensor.name} reads back as {entry.tensor_type.name} {list(shape)}")
    return {name: int(entry.data_offset) for name, entry in found.items()}


def _check_metadata(path: Path, reader: gguf.GGUFReader, metadata: Metadata) -> None:
    wanted = {"general.architecture": (Kind.STRING, None, metadata.architecture), **metadata.values}
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    if keys != set(wanted):
        raise OutputError(f"{path}: keys {sorted(keys ^ set(wanted))} are missing or extra")
    for key, (kind, element, value) in wanted.items():
        entry = reader.fields[key]
        if entry.types != ([kind] if element is None else [kind, element]):
            raise OutputError(f"{path}: {key} reads back with types {entry.types}")
        got = entry.contents()
        if Kind.FLOAT32 in (kind, element):
            same = np.array_equal(np.float32(got), np.float32(value))
        else:
            same = got == value
        if not same:
            raise OutputError(f"{path}: {key} reads back differently")


def _check_tensor(file: InputFile, offset: int, tensor: OutTensor) -> None:
    """|stored - wanted| within the rounding of the type, everything finite."""
    for start, stop in tensor.checked():
        wanted = tensor.rows(start, stop)
        at = offset + tensor.kind.n_bytes(start * tensor.source.row_elements)
        got = decode(file.read(at, tensor.kind.n_bytes(wanted.size)), wanted.shape[0], tensor.kind)
        if not agrees(got, wanted, tensor.kind):
            raise OutputError(
                f"{tensor.name}: rows {start}..{stop} read back beyond the rounding of {tensor.kind}"
            )


def matrix_or_f32(shape: Sequence[int], kind: GgmlType) -> GgmlType:
    """`kind` for a matrix, f32 for a vector; f16 where the rows do not divide into the blocks of `kind`."""
    if len(shape) < 2:
        return F32
    return kind if shape[-1] % kind.block == 0 else F16
