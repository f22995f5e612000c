"""Rows of a picture in a file: ``.safetensors``, or NumPy's ``.npz``.

Both hold the rows as `array`, float32 [n_tokens, n_embd], and a JSON object that tells what made them: in safetensors as
the text `pyllava` of the metadata, in npz as the bytes of an array `about`. Files may come from anywhere: nothing in them is
unpickled or unpacked, and no more memory is taken than the file is long.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._part_file import replacing
from ._plain import plain
from .errors import ImageError

FloatArray: TypeAlias = npt.NDArray[np.float32]
Contents: TypeAlias = "tuple[FloatArray, dict[str, Any]]"

_ROWS, _ABOUT, _IN_METADATA = "array", "about", "pyllava"
_MOST_ABOUT = 1 << 16  # bytes of JSON


def write(path: Path, array: FloatArray, about: Mapping[str, Any]) -> None:
    """Writes the file as a whole or not at all; its suffix says which of the formats. ValueError for what read() would refuse."""
    _, packed = _format_of(path)
    rows = np.ascontiguousarray(array, "<f4")
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise ValueError(
            f"image embedding of shape {np.shape(array)}: need [n_tokens, n_embd] finite numbers"
        )
    data = packed(rows, json.dumps(about))
    with replacing(path, n_bytes=len(data), durable=False) as file:
        file.write(data)


def read(path: Path) -> Contents:
    """The rows, and what made them. Raises FileNotFoundError, or ImageError for what is no such file, or damaged."""
    unpacked, _ = _format_of(path)
    path.stat()  # FileNotFoundError and the like
    if not path.is_file():  # a pipe would be waited for
        raise ImageError(f"{path}: not a regular file")
    data = path.read_bytes()
    try:
        array, text = unpacked(data)
        about = json.loads(text)
    except Exception as error:  # whatever the parsers make of hostile bytes
        reason = plain(" ".join(str(error).split()))[:200] or type(error).__name__
        raise ImageError(f"{path}: no image embedding, or a damaged one: {reason}") from None
    if not isinstance(about, dict):
        raise ImageError(f"{path}: {_ABOUT}: found {type(about).__name__}, need an object")
    if not np.isfinite(array).all():
        raise ImageError(f"{path}: NaN or infinite numbers in the rows")
    return array, about


# --- safetensors: the header's length in 8 bytes, the header in JSON, the data ---


def _safetensors(array: FloatArray, about: str) -> bytes:
    tensor = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [0, array.nbytes]}
    header = json.dumps({"__metadata__": {_IN_METADATA: about}, _ROWS: tensor}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + array.tobytes()


def _from_safetensors(data: bytes) -> tuple[FloatArray, str]:
    n = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= n <= min(len(data) - 8, 2 * _MOST_ABOUT):
        raise ValueError(f"a header of {n} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + n])
    tensor = header[_ROWS]
    if tensor["dtype"] != "F32" or tensor["data_offsets"] != [0, len(data) - 8 - n]:
        raise ValueError(f"{_ROWS}: need F32 that fills the file")
    return _shaped(data[8 + n :], tensor["shape"]), str(header["__metadata__"][_IN_METADATA])


# --- npz: a zip archive of arrays, not compressed ---


def _npz(array: FloatArray, about: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{_ROWS: array, _ABOUT: np.frombuffer(about.encode(), np.uint8)})  # type: ignore[arg-type]
    return file.getvalue()


def _from_npz(data: bytes) -> tuple[FloatArray, str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        shape, rows = _member(archive, _ROWS, "<f4", len(data))
        (n,), about = _member(archive, _ABOUT, "|u1", _MOST_ABOUT)
    if n != len(about):
        raise ValueError(f"{_ABOUT}: found {len(about)} bytes, need {n}")
    return _shaped(rows, shape), about.decode()


def _member(archive: zipfile.ZipFile, name: str, dtype: str, most: int) -> tuple[Any, bytes]:
    """Shape and bytes of an array of this type, in the order of C."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise ValueError(f"{name}: compressed, or too large ({entry.file_size} bytes)")
    file = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name}: need version 1.0 of npy")
    shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
    if found.str != dtype or is_fortran:
        raise ValueError(f"{name}: found {found.str}, need {dtype} in the order of C")
    return shape, file.read()


# --- both ---


def _shaped(rows: bytes, shape: Any) -> FloatArray:
    sound = isinstance(shape, list | tuple) and len(shape) == 2
    if not sound or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"{_ROWS}: shape {str(shape)[:80]}, need [n_tokens, n_embd]")
    if 4 * math.prod(shape) != len(rows):
        raise ValueError(f"{_ROWS}: shape {str(shape)[:80]} with {len(rows)} bytes")
    array: FloatArray = np.frombuffer(rows, "<f4").reshape(shape).astype(np.float32, copy=False)
    return array


_Unpack: TypeAlias = Callable[[bytes], "tuple[FloatArray, str]"]
_Pack: TypeAlias = Callable[[FloatArray, str], bytes]
_FORMATS: dict[str, tuple[_Unpack, _Pack]] = {
    ".safetensors": (_from_safetensors, _safetensors),
    ".npz": (_from_npz, _npz),
}


def _format_of(path: Path) -> tuple[_Unpack, _Pack]:
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise ValueError(f"{os.fspath(path)!r}: need a name that ends in {' or '.join(_FORMATS)}")
    return found
