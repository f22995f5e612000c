"""Number formats of tensors, and rows of numbers from and to them."""

from __future__ import annotations

import ctypes as c
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .functions import _Rows, _TensorType
from .load import _check, lib
from .values import FloatArray, _pointer


@dataclass(frozen=True)
class TensorType:
    """A number format of GGUF files: `block` elements are stored together in `block_bytes`."""

    name: str
    id: int
    block: int
    block_bytes: int
    can_quantize: bool
    can_dequantize: bool

    def n_bytes(self, n: int) -> int:
        """Bytes of `n` elements, a multiple of the block."""
        return n // self.block * self.block_bytes


@functools.cache
def tensor_type(name: str) -> TensorType:
    """The format of this name, in any case. Raises ValueError where there is none."""
    found = _TensorType()
    _check(lib.pyllava_tensor_type_find(name.encode(), c.byref(found)))
    name = found.name.decode()
    return TensorType(name, found.id, found.block, found.block_size, found.can_quantize, found.can_dequantize)


def quantize(x: FloatArray, kind: TensorType, out: npt.NDArray[np.uint8], first: int = 0) -> None:
    """f32 [n, k] to the bytes of `kind`, both contiguous. `first`: the first row's number in messages."""
    rows = _Rows(kind.name.encode(), *x.shape, first, out.nbytes)
    _check(lib.pyllava_quantize(c.byref(rows), _pointer(x), _pointer(out)))


def dequantize(data: npt.NDArray[np.uint8], kind: TensorType, out: FloatArray, first: int = 0) -> None:
    """The bytes of n rows of `kind` to f32 [n, k], both contiguous."""
    rows = _Rows(kind.name.encode(), *out.shape, first, data.nbytes)
    _check(lib.pyllava_dequantize(c.byref(rows), _pointer(data), _pointer(out)))
