"""The models that are compared, and what they are asked. No torch: the goldens are made from the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tiny import TinySpec

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """`outtype`: of the GGUF files. `lossless`: they hold the checkpoint's weights (but for f16 patches)."""

    spec: TinySpec
    outtype: str = "f32"
    lossless: bool = True


CASES = {
    "gqa": Case(TinySpec()),
    "mha": Case(
        TinySpec(
            n_head_kv=4, image_size=28, patch_size=7, v_layer=4, rope_theta=1e6, eps=1e-6, v_eps=1e-6, seed=1
        )
    ),
    "tied": Case(TinySpec(tied=True, n_head=8, n_head_kv=1, image_size=98, v_layer=5, n_layer=3, seed=2)),
    "heads of 12": Case(
        TinySpec(  # epsilons so large that the right one, not just a small one, is needed
            n_embd=60,
            n_head=5,
            n_head_kv=5,
            n_ff=100,
            eps=0.02,
            v_embd=36,
            v_head=3,
            v_ff=100,
            v_eps=0.01,
            image_size=42,
            seed=3,
        )
    ),
    "heads of 20": Case(
        TinySpec(n_embd=100, n_head=5, n_head_kv=1, n_ff=101, v_embd=40, v_head=2, v_ff=75, tied=True, seed=4)
    ),
    "heads of 40": Case(
        TinySpec(n_embd=120, n_head=3, n_head_kv=3, n_ff=88, v_embd=80, v_head=2, image_size=21, patch_size=7)
    ),
    "f16 checkpoint": Case(TinySpec(dtype="f16", seed=5), "f16"),
    "bf16 checkpoint": Case(TinySpec(dtype="bf16", tied=True, seed=6), "bf16"),
    "bf16 to f16": Case(TinySpec(dtype="bf16", n_head_kv=1, seed=7), "f16"),
    "f32 to f16": Case(TinySpec(seed=8), "f16", lossless=False),
    "bf16 to f32": Case(TinySpec(dtype="bf16", eps=1e-6, seed=9), "f32"),
    "qwen2": Case(TinySpec(family="qwen2", tied=True, rope_theta=1e6, eps=1e-6, seed=10)),
    "granite": Case(TinySpec(family="granite", tied=True, eps=1e-5, rope_theta=3e5, seed=11)),
}
GOLDEN_CASES = ("gqa", "mha", "heads of 12", "bf16 checkpoint", "qwen2")
GOLDEN_PICTURE = (11, 90, 61)  # seed, width, height

# LLaVA-1.6: the same weights, a newline, and these resolutions, in tiles across and down.
NEXT_CASES = ("gqa", "mha", "tied", "bf16 checkpoint")
TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
NEXT_GOLDEN = "gqa"
NEXT_GOLDEN_PICTURE = (12, 130, 101)  # in five views, some rows of patches cut off


def pinpoints(spec: TinySpec) -> tuple[tuple[int, int], ...]:
    """(width, height)"""
    return tuple((columns * spec.image_size, rows * spec.image_size) for columns, rows in TILES)


def newline(spec: TinySpec) -> Array:
    """float32 [n_embd]"""
    return np.random.RandomState(spec.seed + 500).standard_normal(spec.n_embd).astype(np.float32)


def picture(seed: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """u8 [H, W, 3]: noise on slopes, so that neither averages nor edges are all alike."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) * 5 % 256], -1)
    return ((slopes + random.randint(0, 128, (height, width, 3))) % 256).astype(np.uint8)


def text(seed: int, n: int, n_vocab: int) -> list[int]:
    """Token ids that are no control tokens."""
    return [int(i) for i in np.random.RandomState(seed).randint(3, n_vocab, n)]


def prompt(spec: TinySpec, embeddings: Sequence[Array]) -> list[list[int] | Array]:
    """BOS, text, and each image followed by text: more rows than one step of logits, a multiple of nothing."""
    out: list[list[int] | Array] = [[1, *text(spec.seed, 19, spec.n_vocab)]]
    for i, rows in enumerate(embeddings):
        out += [np.ascontiguousarray(rows), text(spec.seed + 100 + i, 33 + 8 * i, spec.n_vocab)]
    return out
