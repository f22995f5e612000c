"""Number formats: what a checkpoint stores, what a GGUF file stores, and the way between, through float32.

float32, float16, bfloat16 and q8_0 are written here; the other quantised types by `pyllava.quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError

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
    step: float = 0.0  # of the quantised types that pyllava writes: see `agrees`

    def row_bytes(self, n: int) -> int:
        """Bytes of `n` elements, a multiple of the block."""
        return n // self.block * self.block_bytes


F32 = GgmlType("f32", 0, 0, 1, 4)
F16 = GgmlType("f16", 1, 1, 1, 2)
Q8_0 = GgmlType("q8_0", 8, 7, 32, 34)
BF16 = GgmlType("bf16", 30, 32, 1, 2)
OUT_TYPES = {kind.name: kind for kind in (F32, F16, BF16, Q8_0)}  # what is written without pyllava
# The last number is the step in terms of a block's largest number; q4_0 and q5_0 reach one step less on one
# side than on the other, so that an error there can be a whole one.
_QUANTIZED = (
    GgmlType("q4_0", 2, 2, 32, 18, 1 / 4),
    GgmlType("q4_1", 3, 3, 32, 20, 1 / 7.5),
    GgmlType("q5_0", 6, 8, 32, 22, 1 / 8),
    GgmlType("q5_1", 7, 9, 32, 24, 1 / 15.5),
    GgmlType("q2_k", 10, 10, 256, 84, 1 / 1.5),
    GgmlType("q3_k", 11, 12, 256, 110, 1 / 3.5),
    GgmlType("q4_k", 12, 15, 256, 144, 1 / 7.5),
    GgmlType("q5_k", 13, 17, 256, 176, 1 / 15.5),
    GgmlType("q6_k", 14, 18, 256, 210, 1 / 31.5),
)
KINDS = {**OUT_TYPES, **{kind.name: kind for kind in _QUANTIZED}}


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
    if kind is not Q8_0:
        return _quantized(x, kind)
    from gguf import GGMLQuantizationType, quants  # bit-exact with ggml's own encoder

    return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType.Q8_0))


def _quantized(x: FloatArray, kind: GgmlType) -> AnyArray:
    from pyllava.errors import PyllavaError
    from pyllava.quantize import quantize_rows

    try:
        data: AnyArray = quantize_rows(np.ascontiguousarray(x), kind.name.upper())
    except PyllavaError as error:
        raise CheckpointError(str(error)) from None
    return data


def decode(data: bytes | bytearray, rows: int, kind: GgmlType) -> FloatArray:
    """The bytes of `rows` rows of a GGUF tensor -> float32 [rows, n]."""
    if kind.step:
        from gguf import GGMLQuantizationType, quants

        raw = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
        return np.asarray(quants.dequantize(raw, GGMLQuantizationType(kind.ggml_id)), dtype=np.float32)
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


def agrees(got: FloatArray, wanted: FloatArray, kind: GgmlType) -> bool:
    """Whether `got`, rows read back from a file, is `wanted` but for the rounding of the type.

    Quantised types of pyllava choose their steps by search, so no element has a bound of its own; but in each
    row the root mean square of the error stays below that of half a step, where a step is `kind.step` times
    the largest number of its block. Other rows, another order or another scale are far beyond that.
    """
    if not np.isfinite(got).all():
        return False
    if not kind.step:
        return bool((np.abs(got - wanted) <= tolerance(wanted, kind)).all())
    blocks = wanted.reshape(len(wanted), -1, kind.block)
    amax = np.abs(blocks).max(axis=2)
    error = (got.reshape(blocks.shape) - blocks).astype(np.float64)
    allowed = kind.step / 2 * np.sqrt((amax.astype(np.float64) ** 2).mean(axis=1)) + 127 * 2.0**-25
    return bool((np.sqrt((error**2).mean(axis=(1, 2))) <= allowed).all())
