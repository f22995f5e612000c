"""Python values in the form that C takes."""

from __future__ import annotations

import operator
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]


def _i32(name: str, value: int) -> int:
    """`value`, if C's 32 bits hold it: ctypes would cut it silently."""
    number = operator.index(value)
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name}: found {number}, need a number of 32 bits")
    return number


def _pointer(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _path(path: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path {os.fspath(path)!r} holds a zero byte")
    return encoded


def _text(name: str, value: str) -> bytes:
    """`value` for C: as the environment or the command line may have given it."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name}: found {value!r}, need a text")
    return os.fsencode(value)
