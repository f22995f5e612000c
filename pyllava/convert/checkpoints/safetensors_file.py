"""The safetensors format: an 8-byte length, a JSON header, then the data. Read with every check, written as a
stream.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, OutputError, shown
from .dtypes import FLOATS, STORED
from .tensor import InputFile, Tensor, chunks, row_major

MAX_HEADER = 100_000_000
MAX_TENSORS = 65_536
MAX_DIMS = 8
MAX_DEPTH = 8
DTYPES = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16",
    "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8",
    "U64": "u64", "U32": "u32", "U16": "u16", "U8": "u8",
    "BOOL": "bool", "F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2",
}  # fmt: skip


def read_safetensors(file: InputFile) -> dict[str, Tensor]:
    """All tensors of an open file, after checking the whole header. Raises CheckpointError."""
    header, data_start = _header(file)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file.path}: {len(header)} tensors, at most {MAX_TENSORS}")
    spans: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            _check_metadata(file, entry)
            continue
        dtype, shape, begin, end = _entry(file, name, entry)
        spans.append((begin, end, name))
        tensors[name] = Tensor(name, dtype, shape, row_major(shape), file, data_start + begin)
    _check_spans(file, sorted(spans), file.size - data_start)
    return tensors


def _header(file: InputFile) -> tuple[dict[str, Any], int]:
    """The JSON object and the offset of the data."""
    if file.size < 8:
        raise CheckpointError(f"{file.path}: {file.size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{file.path}: header length {length}, at most {MAX_HEADER}")
    if length > file.size - 8:
        raise CheckpointError(f"{file.path}: header length {length}, but the file has {file.size} bytes")
    data = bytes(file.read(8, length))
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file.path}: header starts with {shown(data[:8])}, need '{{'")
    _check_depth(file, data)
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: header: {_first_line(error)}") from None
    return header, 8 + length


def _check_depth(file: InputFile, data: bytes) -> None:
    """Refuse deep nesting, and more lists than tensors need, before the JSON parser sees them."""
    brackets = re.sub(rb"[^\[\]{}]+", b"", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data))
    if len(brackets) > 2 * (4 * MAX_TENSORS):
        raise CheckpointError(f"{file.path}: header holds more lists than {MAX_TENSORS} tensors need")
    depth = 0
    for byte in brackets:
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{file.path}: header nested deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {shown(name)} appears twice")
        result[name] = value
    return result


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_metadata(file: InputFile, entry: Any) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError(f"{file.path}: __metadata__ is not a table of strings")


def _entry(file: InputFile, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one tensor; begin and end count from the data section."""
    where = f"{file.path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {shown(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape is not a list of at most {MAX_DIMS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets are not [begin, end]")
    need = math.prod(shape) * STORED[dtype].itemsize
    if need != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {shown(entry['dtype'])} {shape} needs {need} bytes, has {offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_spans(file: InputFile, spans: list[tuple[int, int, str]], data_size: int) -> None:
    """The data section is covered exactly: no hole, no overlap, no tail."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"{file.path}: {shown(name)} at byte {begin} {what}, need {position}")
        position = end
    if position != data_size:
        what = "cut short" if position > data_size else "bytes after the last tensor"
        raise CheckpointError(
            f"{file.path}: {what}: tensors need {position} bytes of data, file has {data_size}"
        )


def safetensors_header(tensors: Sequence[tuple[str, Tensor]], dtype: str | None) -> bytes:
    """The bytes before the data; `tensors` are (name to write, source), `dtype` None keeps the source's."""
    names = {value: key for key, value in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        kind = dtype or tensor.dtype
        size = math.prod(tensor.shape) * STORED[kind].itemsize
        header[name] = {
            "dtype": names[kind],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(out: BinaryIO, tensors: Sequence[tuple[str, Tensor]], dtype: str | None) -> None:
    """Stream (name, source) pairs; `dtype` is "f32" or None (as stored)."""
    out.write(safetensors_header(tensors, dtype))
    for _, tensor in tensors:
        for start, stop in chunks(tensor.n_rows, tensor.row_elements):
            if dtype is None or dtype == tensor.dtype:
                out.write(tensor.stored_rows(start, stop).tobytes())
            else:
                out.write(tensor.rows(start, stop).astype("<f4", copy=False).tobytes())


def check_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]], dtype: str | None) -> None:
    """Read a written file back and compare every number with its source. Raises OutputError."""
    with InputFile(path) as file:
        found = read_safetensors(file)
        wanted = dict(tensors)
        if set(found) != set(wanted):
            raise OutputError(f"{path}: holds {len(found)} tensors, wrote {len(wanted)}")
        for name, source in wanted.items():
            copy = found[name]
            if copy.shape != source.shape or copy.dtype != (dtype or source.dtype):
                raise OutputError(f"{path}: {shown(name)} reads back as {copy.dtype} {list(copy.shape)}")
            for start, stop in chunks(source.n_rows, source.row_elements):
                if source.dtype in FLOATS:
                    same = (copy.rows(start, stop) == source.rows(start, stop)).all()
                else:
                    same = (copy.stored_rows(start, stop) == source.stored_rows(start, stop)).all()
                if not same:  # NaN is unequal to itself, so a checkpoint that holds one ends here too
                    raise OutputError(
                        f"{path}: {shown(name)} holds NaN or reads back differently, rows {start}..{stop}"
                    )
