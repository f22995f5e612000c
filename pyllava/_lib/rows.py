"""Input and results of a step: runs of rows, which are tokens or parts of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .sampler import Choice, SamplerHandle
from .values import FloatArray


@dataclass(frozen=True)
class Tokens:
    """Part of a prompt: token ids."""

    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens(self.ids[start:stop])

    def contents(self) -> npt.NDArray[np.uint64]:
        """The content of each row as one number."""
        return np.array(self.ids, np.int64).astype(np.uint64)


@dataclass(frozen=True)
class Rows:
    """Part of a prompt: image embeddings float32 [n, n_embd]; `key` (64 bits) names the picture."""

    embd: FloatArray
    key: int

    def __len__(self) -> int:
        return len(self.embd)

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows, with the same contents."""
        return Rows(self.embd[start:stop], (self.key + _ROW * start) % 2**64)

    def contents(self) -> npt.NDArray[np.uint64]:
        """The content of each row as one number, which is never a token's."""
        rows = np.arange(len(self), dtype=np.uint64) * np.uint64(_ROW)
        found: npt.NDArray[np.uint64] = (rows + np.uint64(self.key % 2**64)) | np.uint64(2**63)
        return found


Span: TypeAlias = Tokens | Rows

_ROW = 0x9E3779B97F4A7C15  # added to a picture's key from row to row, as in prompt.c

LAST = -1
NOTHING = 2**31 - 1


@dataclass(frozen=True)
class Run:
    """Rows of one sequence in a step, and the wanted results; see ``pyllava_run`` in ``csrc/pyllava.h``."""

    parts: Sequence[Span]
    seq: int = 0
    append: bool = False
    """They follow what the sequence holds; else they are all that it is to hold."""
    answer: bool = False
    """Rows of an answer, else of a prompt."""
    first: int = LAST
    """The row from which on logits are wanted; LAST, or NOTHING."""
    sampler: SamplerHandle | None = None
    """Chooses after the last row, instead of logits; `mask` and `n_alternatives` as in its sample()."""
    mask: npt.NDArray[np.uint32] | None = None
    n_alternatives: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of logits."""
        if self.first < LAST:
            raise ValueError(f"first: found {self.first}, need {LAST} or more")
        if self.sampler is not None:
            return 0
        return 1 if self.first == LAST else max(0, sum(map(len, self.parts)) - self.first)


@dataclass(frozen=True)
class Ran:
    """The results of a run."""

    logits: FloatArray
    """float32 [n_rows, n_vocab]"""
    n_reused: int
    """Rows that the sequence held already."""
    choice: Choice | None
