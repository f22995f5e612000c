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
        raise ValueError(f"{name}: found {number_text(number)}, need a number of 32 bits")
    return number


def _real(name: str, value: float) -> float:
    """`value`, if C's numbers can hold it; an integer of Python's may be too large even to be written down."""
    try:
        return float(value) if isinstance(value, int) else value
    except OverflowError:
        raise ValueError(f"{name}: found {number_text(value)}, need a finite number") from None


def number_text(number: float) -> str:
    """A number as a message shows it: of 400 digits, none."""
    return str(number) if abs(number) < 10**20 else f"{'-' if number < 0 else ''}10**20 or more"


def is_false(answer: object) -> bool:
    """Whether a callback has said False, be it NumPy's."""
    return answer is False or (isinstance(answer, np.bool_) and not answer)


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
