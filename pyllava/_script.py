"""What a sequence is to hold: token ids and image rows, computed as rows of a prompt or of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._lib import Run, Span, Tokens

Contents = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Stretch:
    """Rows of one kind. Their bytes depend on the kind, so rows of an answer are recomputed as such."""

    span: Span
    answer: bool = False

    def __len__(self) -> int:
        return len(self.span)


@dataclass(frozen=True)
class Piece:
    """Some rows of a script, of one kind, that one step computes."""

    spans: Sequence[Span]
    answer: bool
    n: int


class Script:
    """Stretches one after the other."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = [stretch for stretch in stretches if len(stretch)]
        self._n = sum(map(len, self.stretches))

    def __len__(self) -> int:
        return self._n

    def followed_by(self, answer: Sequence[int]) -> Script:
        """The same, followed by tokens of an answer."""
        return Script([*self.stretches, Stretch(Tokens(tuple(answer)), answer=True)])

    def runs(self) -> list[Run]:
        """As one run after the other, to compare it with what a sequence holds."""
        return [Run([stretch.span], answer=stretch.answer) for stretch in self.stretches]

    def contents(self) -> Contents:
        """The content of each row as one number. Equal numbers of different kinds are not the same row."""
        parts = [stretch.span.contents() for stretch in self.stretches]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def answered(self) -> npt.NDArray[np.bool_]:
        """Which rows are those of an answer."""
        kinds = [stretch.answer for stretch in self.stretches]
        return np.repeat(np.array(kinds, np.bool_), [len(stretch) for stretch in self.stretches])

    def shared_with(self, other: Script) -> int:
        """Rows at the beginning that are the same in both, and of the same kind."""
        n = min(len(self), len(other))
        same = self.contents()[:n] == other.contents()[:n]
        same &= self.answered()[:n] == other.answered()[:n]
        return _n_first(same)

    def piece(self, start: int, most: int) -> Piece:
        """The rows from `start` on that are of one kind, at most so many."""
        spans: list[Span] = []
        n, kind = 0, None
        for stretch, first in self._starts():
            a, b = max(start - first, 0), min(len(stretch), start + most - first)
            if a >= len(stretch):
                continue
            if b <= a or kind not in (None, stretch.answer):
                break
            kind = stretch.answer
            spans.append(stretch.span.part(a, b))
            n += b - a
        return Piece(spans, bool(kind), n)

    def _starts(self) -> Iterator[tuple[Stretch, int]]:
        first = 0
        for stretch in self.stretches:
            yield stretch, first
            first += len(stretch)

    def after(self, before: Script) -> Script:
        """The same rows; those at the beginning that are equal in `before` get their kinds from it.

        A conversation's next prompt repeats earlier answers. If the sequence still holds their rows, these
        were computed as rows of answers; so they are computed as such again if it does not.
        """
        n = min(len(self) - 1, len(before))
        same = self.contents()[:n] == before.contents()[:n]
        n_shared = _n_first(same)
        kinds = before.answered()[:n_shared]
        found = []
        for stretch, first in self._starts():
            edges = np.flatnonzero(np.diff(kinds[first : first + len(stretch)])) + 1
            inside = [int(edge) for edge in edges]
            if first < n_shared < first + len(stretch):
                inside.append(n_shared - first)
            for a, b in zip([0, *inside], [*inside, len(stretch)], strict=True):
                answer = first + a < n_shared and bool(kinds[first + a])
                found.append(Stretch(stretch.span.part(a, b), answer))
        return Script(found)


def _n_first(same: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(same) if same.all() else int(np.argmin(same))
