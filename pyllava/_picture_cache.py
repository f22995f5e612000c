"""Embeddings of pictures that were shown, by the pictures' content: the last ones, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any


class PictureCache:
    """get() may be called from any thread, all else in the engine's."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.n_bytes = self.n_hits = self.n_misses = 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, content: bytes) -> Any:
        """The embedding of a picture, or None."""
        return self._kept.get(content)

    def hit(self, content: bytes) -> None:
        """An embedding was used again: it is the last to go."""
        self.n_hits += 1
        if content in self._kept:
            self._kept.move_to_end(content)

    def missed(self, content: bytes, embedding: Any, *, keep: bool) -> None:
        """An embedding had to be computed; `keep`: it takes the place of others, if there is room for it at all."""
        self.n_misses += 1
        size = embedding.array.nbytes
        if not keep or size > self.most_bytes or content in self._kept:
            return
        self._kept[content] = embedding
        self.n_bytes += size
        while self.n_bytes > self.most_bytes:
            self.n_bytes -= self._kept.popitem(last=False)[1].array.nbytes

    def clear(self) -> None:
        """Lets go of all of them."""
        self._kept = OrderedDict()
        self.n_bytes = 0
