"""The way to the end of a text that a grammar allows: how an answer is closed when its tokens run short.

A matcher over single bytes (`letters`) says which may follow. Reading one takes about a microsecond, a copy as much.
"""

from __future__ import annotations

import heapq
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Found: TypeAlias = tuple[bytes | None, bool]
"""A way to the end, and whether there was time to look everywhere."""

STEPS = 2000  # of a search, each a byte: about 10 ms; a number, so that answers do not depend on the time
_BUILD_STEPS = 50  # to compile an expression
_MOST_SECONDS = 0.05  # of the processor, where steps are slow
_LONGEST = 1 << 13  # bytes of a way
_BOUND = 8  # bytes of the first way of an expression that is looked for
_N_BYTES = 256
_TRIED_AGAIN = 4  # visits of a state after which other bytes are tried
_N_MASK = 36  # bytes of a mask of bytes and of the end, in whole words

# In which order bytes are tried on the way to the end: what closes first, what opens last.
_CLOSING = b"}])\".,;>'0123456789nabcdefghijklmopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-+*/=!?: \n\r\t"
_OPENING = b"([{<\\"
_ORDER = {byte: place for place, byte in enumerate(_CLOSING)} | dict.fromkeys(_OPENING, 1000)
_FILLING = b'abcdghijklmopqrsuvwxyz"}]),0123456789'  # what goes on where nothing is news, as in a text with a least length
_FILLERS = {byte: place - 100 for place, byte in enumerate(_FILLING)}


class _Budget:
    """How many steps a search may take."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self._end = time.thread_time() + _MOST_SECONDS * steps / STEPS

    def spend(self, steps: int = 1) -> bool:
        """Takes some of them; False: there are not so many."""
        self._left -= steps
        return self._left >= 0 and time.thread_time() < self._end


class Ends(ABC):
    """Finds ways to the end from where `letters` stands, which has read `text`."""

    @abstractmethod
    def first(self, letters: Any, text: bytes, steps: int = STEPS) -> Found:
        """A short one, soon."""

    @abstractmethod
    def shortest(self, letters: Any, text: bytes) -> Found:
        """The shortest one that can be found."""


class GrammarEnds(Ends):
    """Of any grammar: by trying."""

    def first(self, letters: Any, text: bytes, steps: int = STEPS) -> Found:
        return _depth(letters, _Budget(steps))

    def shortest(self, letters: Any, text: bytes) -> Found:
        return _breadth(letters, _Budget(STEPS))


class RegularEnds(Ends):
    """Of a regular expression: `make` gives a matcher over bytes for its texts of limited length.

    Its automaton has no dead ends, so that any byte that it allows leads to the end within that length.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def first(self, letters: Any, text: bytes, steps: int = STEPS) -> Found:
        found, _ = self._bounded(text, _Budget(steps))
        return found, False

    def shortest(self, letters: Any, text: bytes) -> Found:
        budget = _Budget(STEPS)
        found, too_few = self._bounded(text, budget)
        enough = 0 if found is None else len(found)
        while enough - too_few > 1 and budget.spend(_BUILD_STEPS):
            n = (too_few + enough) // 2
            less = self._within(text, n, budget)
            if less is None:
                too_few = n
            else:
                found, enough = less, len(less)
        return found, found is not None

    def _bounded(self, text: bytes, budget: _Budget) -> tuple[bytes | None, int]:
        """A way to the end, and a length that does not suffice."""
        too_few, n = -1, _BOUND
        while n <= _LONGEST and budget.spend(_BUILD_STEPS):
            found = self._within(text, n, budget)
            if found is not None:
                return found, too_few
            too_few, n = n, 4 * n
        return None, too_few

    def _within(self, text: bytes, n: int, budget: _Budget) -> bytes | None:
        """A way to the end of so many characters at most."""
        here = self._make(len(text) + n)
        if here.is_error() or (text and here.try_consume_tokens([*text]) != len(text)):
            return None
        way = bytearray()
        while not here.is_accepting():
            allowed = _allowed(here.compute_bitmask())
            if not allowed or not budget.spend():
                return None
            way.append(min(allowed, key=_place))
            here.consume_token(way[-1])
        return bytes(way)


def _allowed(state: bytes) -> list[int]:
    """The bytes that a mask allows."""
    bits = np.unpackbits(np.frombuffer(state, np.uint8), bitorder="little")[:_N_BYTES]
    return list(map(int, np.flatnonzero(bits)))


def _place(byte: int) -> int:
    return _ORDER.get(byte, 500 + byte)


def _state(here: Any) -> bytes:
    """What tells states apart: the bytes that may follow, and those that must. Different ones may look the same."""
    mask: bytes = here.compute_bitmask()
    return mask + bytes(here.compute_ff_bytes())


def _depth(letters: Any, budget: _Budget) -> Found:
    """A search in depth; what it tried on its way is left out where that can be."""
    search = _Depth(letters.deep_copy())
    if not search.run(budget):
        return None, search.is_whole
    ways = [
        bytes(search.way),
        *(_straight(letters, search.way, leaves) for leaves in (search.taken, search.left)),
    ]
    return min(filter(None, ways), key=len, default=b""), True


class _Depth:
    """A search in depth. Bytes that lead to a new state come first, and of these what closes before what opens.

    In a state that was there before, what led to news the first time is taken again, as the end of a text does in one
    after the other; at times others are tried. Where nothing is news, as in a text with a least length, one that fills.
    """

    def __init__(self, here: Any) -> None:
        self._here = here
        self.way = bytearray()
        self.taken: dict[bytes, int] = {}
        """What was taken first in each state."""
        self.left: dict[bytes, int] = {}
        """What was taken last."""
        self.is_whole = True
        """Nothing was left out that could have led to the end."""
        self._states: list[bytes] = []  # along the way
        self._seen: set[bytes] = set()
        self._allowed: dict[bytes, list[int]] = {}
        self._untried: dict[bytes, list[int]] = {}
        self._n_visits: dict[bytes, int] = {}

    def run(self, budget: _Budget) -> bool:
        while not self._here.is_accepting():
            if not budget.spend() or len(self.way) >= _LONGEST or self._here.is_error():
                self.is_whole = False
                return False
            byte = self._next(budget)
            if byte is None and (byte := self._other()) is None:
                self.is_whole = self.is_whole and not self._here.is_error()
                return False
            self._here.consume_token(byte)
            self.way.append(byte)
            self.left[self._states[-1]] = byte
        return True

    def _next(self, budget: _Budget) -> int | None:
        """The byte to go on with; None: there is none."""
        state = _state(self._here)
        self._states.append(state)
        self._seen.add(state)
        if state not in self._allowed:
            self._allowed[state] = self._candidates(state)
            self._untried[state] = [*self._allowed[state]]
        n = self._n_visits[state] = self._n_visits.get(state, 0) + 1
        untried = self._untried[state]
        while untried and n % _TRIED_AGAIN == 1:
            byte = untried.pop(0)
            budget.spend()
            if self._is_news(byte):
                self.taken.setdefault(state, byte)
                return byte
        allowed = self._allowed[state]
        if not allowed:
            return None
        self.is_whole = False
        if n % _TRIED_AGAIN == 1 and n > 1:  # what closes may lead on, although it does not show
            return allowed[0]
        return self.taken.setdefault(state, min(allowed, key=lambda byte: _FILLERS.get(byte, _place(byte))))

    def _candidates(self, state: bytes) -> list[int]:
        """The bytes to try: characters of several bytes and escapes only where nothing else may follow."""
        allowed = sorted(_allowed(state[:_N_MASK]), key=_place)
        plain = [byte for byte in allowed if byte < 128 and byte != ord("\\")]
        self.is_whole = self.is_whole and len(plain) in (0, len(allowed))
        return plain or allowed

    def _is_news(self, byte: int) -> bool:
        """Whether a byte leads to the end, or to a state that was not yet."""
        self._here.consume_token(byte)
        state, is_end = _state(self._here), bool(self._here.is_accepting())
        self._here.rollback(1)
        is_news = is_end or state not in self._seen
        self._seen.add(state)
        return is_news

    def _other(self) -> int | None:
        """Goes back to where another byte may be tried."""
        while self._states:
            state = self._states[-1]
            if self._untried[state]:
                return self._untried[state].pop(0)
            self._states.pop()
            if self.way:
                self.way.pop()
                self._here.rollback(1)
        return None


def _straight(letters: Any, way: bytearray, leaves: dict[bytes, int]) -> bytes | None:
    """A shorter way, with the byte for each state that `leaves` has; None if that leads nowhere."""
    here, straight = letters.deep_copy(), bytearray()
    while not here.is_accepting():
        byte = leaves.get(_state(here))
        if byte is None or len(straight) >= len(way):
            return None
        here.consume_token(byte)
        straight.append(byte)
    return bytes(straight)


def _breadth(letters: Any, budget: _Budget) -> Found:
    """A search in breadth, in order of length: states that look alike are looked at once."""
    if letters.is_accepting():
        return b"", True
    seen: set[bytes] = set()
    todo: list[tuple[int, int, bytes, Any]] = [(0, 0, b"", letters.deep_copy())]
    n = 0
    while todo and budget.spend():
        _, _, way, here = heapq.heappop(todo)
        if here.is_accepting():
            return way, True
        forced: bytes = here.compute_ff_bytes()
        steps = [] if forced else sorted(_allowed(here.compute_bitmask()), key=_place)
        for step in [forced] if forced else [bytes([byte]) for byte in steps]:
            budget.spend()
            there = here.deep_copy()
            there.consume_tokens([*step])
            after = _state(there)
            if there.is_accepting() or after not in seen:
                seen.add(after)
                n += 1
                heapq.heappush(todo, (len(way) + len(step), n, way + step, there))
    return None, False
