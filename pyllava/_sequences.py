"""The sequences of a session: which are in use, and what the idle ones keep until cells run short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from . import _lib
from ._script import Script

_SMALL = 64  # so few rows are not worth a sequence of their own, or a call that trims them
SHARED_ON_CUDA = 256
"""Fewer common rows are computed again on CUDA: a sequence that shares cells lies in no range of its own, and every step reads
all cells for it."""


class Sequences:
    """Sequences of `session`, all idle at first. An idle one keeps its rows for prompts that begin so.

    `n_cells` are for what is computed together and for what is kept. The session has `n_spare` more, which only a
    request that is alone takes, if it needs them. Two sequences share at least `least_shared` rows, or none.
    """

    def __init__(
        self, session: _lib.SessionHandle, n: int, n_cells: int, n_spare: int = 0, least_shared: int = 1
    ) -> None:
        self._session = session
        self._n_spare = n_spare
        self._least_shared = least_shared
        self.n_cells = n_cells
        self._idle = OrderedDict[int, None].fromkeys(range(n))  # the least recently used first
        self._all = range(n)

    def fits(self, n_rows: int, script: Script, *, reuse: bool) -> bool:
        """Whether a script and what follows it, `n_rows` in all, would fit beside the sequences in use."""
        used = [seq for seq in self._all if seq not in self._idle and reuse]
        n_shared = max(self._session.seq_shared(used, script.runs()), default=0)
        n_shared = n_shared if n_shared >= self._least_shared else 0
        return n_rows - n_shared <= self._free(self._idle)

    def shared(self, script: Script) -> int:
        """The most rows of the script that a sequence already holds."""
        return max(self._session.seq_shared(self._all, script.runs()))

    def take(self, script: Script, most: int) -> tuple[int, int]:
        """Takes a sequence for the script, with at most `most` rows reused; returns it and their number."""
        found = self._session.seq_shared(self._all, script.runs()) if most else []
        held = {seq: min(most, n) for seq, n in enumerate(found)}
        source = max(reversed(self._idle), key=lambda seq: held.get(seq, 0))
        n = held.get(source, 0)
        busy = max((seq for seq in held if seq not in self._idle), key=lambda seq: held[seq], default=source)
        if held.get(busy, 0) >= n:  # its cells stay in use anyway
            source, n = busy, held.get(busy, 0)
        target = self._target(source, n)
        if n < self._least_shared:  # only of its own
            source, n = target, held.get(target, 0)
        if target == source:
            self._session.seq_trim(target, n)
        else:
            self._session.seq_copy(source, target, n)
        del self._idle[target]
        return target, n

    def _target(self, source: int, n_shared: int) -> int:
        """The idle sequence that loses least: `source` if few rows are lost, else an empty or the oldest."""
        lengths = {seq: self._session.seq_length(seq) for seq in self._idle}
        if source in lengths and n_shared and lengths[source] - n_shared <= _SMALL:
            return source
        empty = [seq for seq in lengths if lengths[seq] == 0]
        others = [seq for seq in lengths if seq != source or not n_shared]
        return [*empty, *others, source][0]

    def leave(self, seq: int, n: int | None = None) -> None:
        """Makes a sequence idle; it keeps its rows, or the first `n` of them."""
        if n is not None and self._session.seq_length(seq) > n:
            self._session.seq_trim(seq, n)
        self._idle[seq] = None

    def leave_all(self) -> None:
        """Makes all sequences idle."""
        for seq in self._all:
            self._idle.setdefault(seq)

    def make_room(self, n: int) -> bool:
        """Frees `n` cells by trimming idle sequences; False if that is not enough."""
        free = self._free()
        for seq in self._idle:
            length = self._session.seq_length(seq)
            while free < n and length:
                length = max(0, length - max(n - free, _SMALL))
                self._session.seq_trim(seq, length)
                free = self._free()
        return free >= n

    def n_used(self) -> int:
        """Cells in use."""
        return self.n_cells - self._free()

    def _free(self, without: Iterable[int] = ()) -> int:
        """Cells that nothing holds but the sequences `without`; negative while spare cells are in use."""
        return self._session.cells_free(list(without)) - self._n_spare
