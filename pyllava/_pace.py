"""How fast a model should answer on this machine's CPU: each token reads every weight once, so memory sets the pace."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ._lib import TensorInfo

LEAST_BYTES = 128 << 20
"""For each token: caches keep much of what is smaller, and other things than memory set its pace."""
_PROBE_BYTES = 32 << 20  # for each thread: more than caches hold
_PASSES = 4
_MOST_THREADS = 16


def bytes_per_token(tensors: Iterable[TensorInfo]) -> int:
    """Of the weights of a language model that one token reads: all but the table of embeddings, where the output has its own."""
    sizes = {tensor.name: tensor.n_bytes for tensor in tensors}
    unread = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread


def bandwidth() -> float:
    """Bytes per second that the CPU reads from memory, measured in some milliseconds: the best of a few passes."""
    threads = min(_MOST_THREADS, _n_cpus())
    blocks = [np.ones(_PROBE_BYTES // 8, np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            started = time.perf_counter()
            list(pool.map(np.max, blocks))
            best = max(best, threads * _PROBE_BYTES / (time.perf_counter() - started))
    return best


def about(rate: float) -> str:
    """A rate as precisely as it is known: one digit below 10, two above."""
    digits = 1 if rate < 10 else 2
    return f"{float(f'{rate:.{digits}g}'):g}"


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
