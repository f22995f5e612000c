"""Answers that repeat themselves: the last tokens are one unit over and over, and would be until the answer is full."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_UNIT = 64  # tokens
_REPEATS = 4  # of a unit, at least: a list may well have three lines that are the same
_TOKENS = 48  # of all repeats together, at least: "ha ha ha ha" is no loop yet


class LoopDetector:
    """Told every token of an answer, it says when the answer has fallen into a loop.

    For each length of a unit it counts how many of the last tokens equal the one so far before them, so that a token costs the
    same however long the answer is.
    """

    def __init__(self) -> None:
        self._matching = [0] * (_LONGEST_UNIT + 1)

    def push(self, tokens: Sequence[int]) -> bool:
        """Takes the last one of `tokens`; True if they end in a loop."""
        found = False
        for length in range(1, min(_LONGEST_UNIT, len(tokens) - 1) + 1):
            if tokens[-1] != tokens[-1 - length]:
                self._matching[length] = 0
                continue
            self._matching[length] += 1
            n = self._matching[length] + length
            found = found or n >= max(_TOKENS, _REPEATS * length)
        return found
