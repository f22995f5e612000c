"""The number formats of checkpoints, and their conversion to float32."""

from __future__ import annotations

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


def to_f32(raw: AnyArray, dtype: str) -> FloatArray:
    """Stored numbers as float32, same shape; exact for f16, bf16 and f32."""
    if dtype == "bf16":
        bits: npt.NDArray[np.uint32] = raw.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    with np.errstate(over="ignore"):  # an f64 out of range becomes infinite, which is refused later
        return raw.astype(np.float32, copy=False)
