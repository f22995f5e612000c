"""Number formats of GGUF files: their names, their numbers in a file, and how many elements share a block.

The library knows every type of ggml; these are the ones that files are written in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
"""Number formats of the KV cache."""


@dataclass(frozen=True)
class GgmlType:
    """A number format; its text is its name in lower case, as command lines and names of files have it.

    `step`: of the quantised types without a bound for each element, the step in terms of a block's largest
    number. q4_0 and q5_0 reach one step less on one side than on the other, so that an error there can be a
    whole one.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    step: float = 0.0

    def __str__(self) -> str:
        return self.name.lower()

    def n_bytes(self, n: int) -> int:
        """Bytes of `n` elements, a multiple of the block."""
        return n // self.block * self.block_bytes


F32 = GgmlType("F32", 0, 1, 4)
F16 = GgmlType("F16", 1, 1, 2)
BF16 = GgmlType("BF16", 30, 1, 2)
Q8_0 = GgmlType("Q8_0", 8, 32, 34)
_QUANTIZED = (
    GgmlType("Q4_0", 2, 32, 18, 1 / 4),
    GgmlType("Q4_1", 3, 32, 20, 1 / 7.5),
    GgmlType("Q5_0", 6, 32, 22, 1 / 8),
    GgmlType("Q5_1", 7, 32, 24, 1 / 15.5),
    GgmlType("Q2_K", 10, 256, 84, 1 / 1.5),
    GgmlType("Q3_K", 11, 256, 110, 1 / 3.5),
    GgmlType("Q4_K", 12, 256, 144, 1 / 7.5),
    GgmlType("Q5_K", 13, 256, 176, 1 / 15.5),
    GgmlType("Q6_K", 14, 256, 210, 1 / 31.5),
)

FORMATS: Mapping[str, GgmlType] = MappingProxyType(
    {kind.name: kind for kind in (F32, F16, BF16, Q8_0, *_QUANTIZED)}
)
"""Every format that is written, by its name."""
