"""How much memory a model needs, told from its header, and how much this machine has. Python's estimate of what the
library computes exactly where a model is loaded (``pyllava_session_memory``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USUAL_CTX = 4096
_BUFFER = (
    20 * 1024
)  # bytes of compute buffers for each unit of width, in steps of 1024 positions: 19.4 to 24 were measured


def needed(n_bytes: int, facts: Mapping[str, Any], n_ctx: int = USUAL_CTX) -> int:
    """Bytes for weights of `n_bytes`, and a KV cache of `n_ctx` positions in f16, or as many as the model was trained for.

    `facts`: those of the language model (``_facts.facts_of``). What they do not tell counts nothing.
    """
    n_ctx = min(n_ctx, _count(facts, "context") or n_ctx)
    return n_bytes + kv_bytes(facts) * n_ctx + _BUFFER * _count(facts, "width")


def kv_bytes(facts: Mapping[str, Any]) -> int:
    """Of one position: keys and values in f16, in each layer."""
    width, heads = _count(facts, "width"), _count(facts, "heads")
    heads_kv = _count(facts, "KV heads") or heads
    return 2 * 2 * _count(facts, "layers") * heads_kv * (width // heads) if heads else 0


def free() -> int:
    """Bytes that a model may take now: of host memory, control groups counted, and of GPUs; 0 where unknown."""
    from ._lib import devices

    return sum(device.memory_free for device in devices() if device.kind in ("cpu", "gpu"))


def _count(facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key)
    return value if isinstance(value, int) and value > 0 else 0
