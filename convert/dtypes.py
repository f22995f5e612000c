"""Number formats: what a checkpoint stores, what a GGUF file stores, and the way between, through float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]

# Stored type -> how its bytes are read. bf16 is read as its 16 bits: NumPy has no such type.
STORED: dict[str, np.dtype[Any]] = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "i16": np.dtype("<i2"),
    "i8": np.dtype("i1"),
    "u64": np.dtype("<u8"),
    "u32": np.dtype("<u4"),
    "u16": np.dtype("<u2"),
    "u8": np.dtype("u1"),
    "bool": np.dtype("u1"),
    "f8_e4m3": np.dtype("u1"),
    "f8_e5m2": np.dtype("u1"),
}
FLOATS = ("f64", "f32", "f16", "bf16")


@dataclass(frozen=True)
class GgmlType:
    """One row per type that the converters write (ids: CONTRACT 1.8)."""

    name: str
    ggml_id: int
    file_type: int  # general.file_type of a language model whose matrices have this type
    block: int  # elements per block
    block_bytes: int

    def row_bytes(self, n: int) -> int:
        """Bytes of `n` elements, a multiple of the block."""
        return n // self.block * self.block_bytes


F32 = GgmlType("f32", 0, 0, 1, 4)
F16 = GgmlType("f16", 1, 1, 1, 2)
Q8_0 = GgmlType("q8_0", 8, 7, 32, 34)
BF16 = GgmlType("bf16", 30, 32, 1, 2)
OUT_TYPES = {kind.name: kind for kind in (F32, F16, BF16, Q8_0)}


def to_f32(raw: AnyArray, dtype: str) -> FloatArray:
    """Stored numbers as float32, same shape; exact for f16, bf16 and f32."""
    if dtype == "bf16":
        bits: npt.NDArray[np.uint32] = raw.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    with np.errstate(
        over="ignore"
    ):  # an f64 out of range becomes infinite and is refused with every other non-finite
        return raw.astype(np.float32, copy=False)


def encode(x: FloatArray, kind: GgmlType) -> AnyArray:
    """float32 [rows, n] -> the bytes a GGUF stores, as a contiguous array whose first axis is rows."""
    if kind is F32:
        return np.ascontiguousarray(x, dtype="<f4")
    if kind is F16:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(x, dtype="<f2")
    if kind is BF16:  # round to nearest, ties to even
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    from gguf import GGMLQuantizationType, quants  # bit-exact with ggml's own encoder

    return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType.Q8_0))


def decode(data: bytes | bytearray, rows: int, kind: GgmlType) -> FloatArray:
    """The bytes of `rows` rows of a GGUF tensor -> float32 [rows, n]."""
    if kind is Q8_0:
        blocks = np.frombuffer(data, dtype=np.dtype([("scale", "<f2"), ("q", "i1", (32,))]))
        x: FloatArray = blocks["scale"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)
        return x.reshape(rows, -1)
    stored = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[kind.name]
    return to_f32(np.frombuffer(data, dtype=stored), kind.name).reshape(rows, -1)


def tolerance(x: FloatArray, kind: GgmlType) -> FloatArray:
    """Largest |decode(encode(x)) - x| that rounding explains, per element (per block for q8_0).

    f16 and bf16: half a unit in the last place (11 and 8 significant bits), and half the smallest f16.
    q8_0: half a step of d = amax / 127, plus 127 times the rounding of d itself to f16.
    """
    if kind is F32:
        return np.zeros_like(x)
    size: FloatArray = np.abs(x)
    if kind is F16:
        return np.asarray(size * np.float32(2.0**-11) + np.float32(2.0**-25), dtype=np.float32)
    if kind is BF16:
        return np.asarray(size * np.float32(2.0**-8), dtype=np.float32)
    amax = size.reshape(-1, Q8_0.block).max(axis=1)
    bound = amax * np.float32(0.5 / 127 + 2.0**-11) * np.float32(1.001) + np.float32(127 * 2.0**-25)
    return np.repeat(bound, Q8_0.block).reshape(x.shape)
