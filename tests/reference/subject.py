"""pyllava under examination: intermediates, logits and greedy tokens of a pair of GGUF files. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_gguf import Files

from pyllava import _lib

Array = npt.NDArray[np.float32]


def spans(prompt: Sequence[list[int] | Array], key: int = 1) -> list[_lib.Span]:
    """Lists are token ids, arrays image rows; pictures are told apart by `key` and their place."""
    return [
        _lib.Rows(p, key + i) if isinstance(p, np.ndarray) else _lib.Tokens(p) for i, p in enumerate(prompt)
    ]


class Subject:
    """A model and a session of it: one thread, exact."""

    def __init__(self, files: Files, placement: _lib.Placement | None = None, **session: Any) -> None:
        self.model = _lib.ModelHandle(files.model, files.mmproj, placement=placement)
        options = {"n_ctx": 512, "n_threads": 1, "precision": "exact", **session}
        self.session = _lib.SessionHandle(self.model, **options)

    def close(self) -> None:
        self.session.close()
        self.model.close()

    def encode(self, pixels: Array) -> dict[str, Array]:
        """Every intermediate, in the order of computation, rows of all images on end; "mm.2" the embeddings."""
        found: list[tuple[str, Array]] = []
        self.session.trace(lambda: self.session.encode(pixels), lambda name, x: found.append((name, x)))
        return _joined(found)

    def run(self, prompt: Sequence[list[int] | Array]) -> dict[str, Array]:
        """Every intermediate of a whole sequence, in the order of computation."""
        found: list[tuple[str, Array]] = []
        parts = spans(prompt)
        self.session.trace(lambda: self.session.logits(parts), lambda name, x: found.append((name, x)))
        return _joined(found)

    def logits(self, prompt: Sequence[list[int] | Array]) -> Array:
        return self.session.logits(spans(prompt))

    def greedy(self, prompt: Sequence[list[int] | Array], n: int) -> list[int]:
        """The `n` likeliest next tokens, one after the other, whatever they are."""
        logits, _ = self.session.prefill(spans(prompt))
        ids = [int(logits.argmax())]
        while len(ids) < n:
            ids.append(int(self.session.decode(ids[-1:])[0].argmax()))
        return ids


def _joined(found: list[tuple[str, Array]]) -> dict[str, Array]:
    """Batches of one sequence, one after the other."""
    parts: dict[str, list[Array]] = {}
    for name, x in found:
        parts.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
    return {name: np.concatenate(xs) for name, xs in parts.items()}
