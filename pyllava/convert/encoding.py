"""float32 to the bytes of a GGUF file and back, and how far the two may be apart.

float32, float16, bfloat16 and q8_0 are written here; the other quantised types by `pyllava.quantize`.
"""

from __future__ import annotations

import numpy as np

from ..errors import PyllavaError
from ..formats import BF16, F16, F32, Q8_0, GgmlType
from .checkpoints.dtypes import STORED, AnyArray, FloatArray, to_f32
from .errors import CheckpointError


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
    from ..quantize import quantize_rows

    try:
        data: AnyArray = quantize_rows(np.ascontiguousarray(x), kind.name)
    except PyllavaError as error:
        raise CheckpointError(str(error)) from None
    return data


def decode(data: bytes | bytearray, rows: int, kind: GgmlType) -> FloatArray:
    """The bytes of `rows` rows of a GGUF tensor -> float32 [rows, n]."""
    if kind.step:
        from gguf import GGMLQuantizationType, quants

        raw = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
        return np.asarray(quants.dequantize(raw, GGMLQuantizationType(kind.id)), dtype=np.float32)
    if kind is Q8_0:
        blocks = np.frombuffer(data, dtype=np.dtype([("scale", "<f2"), ("q", "i1", (32,))]))
        x: FloatArray = blocks["scale"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)
        return x.reshape(rows, -1)
    return to_f32(np.frombuffer(data, dtype=STORED[str(kind)]), str(kind)).reshape(rows, -1)


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
