"""The median seconds of an image encoder for one 336-pixel view and for five; see compare.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

REPEAT = 3


def measure(encode: Callable[[npt.NDArray[np.float32]], object]) -> dict[str, float]:
    """`encode` of random pixels [n_views, 3, 336, 336], after one run that is not counted."""
    result = {}
    for name, n_views in (("encode_s", 1), ("encode_5_s", 5)):
        pixels = np.random.RandomState(0).standard_normal((n_views, 3, 336, 336)).astype(np.float32)
        times = []
        for _ in range(REPEAT + 1):
            started = time.perf_counter()
            encode(pixels)
            times.append(time.perf_counter() - started)
        result[name] = statistics.median(times[1:])
    return result
