"""What a grammar lets an answer go on with: masks of tokens, stretches that it forces, the shortest way to its end.

Everything here is of one answer, and is used by the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _lib
from ._closing import Ends
from .answer import FinishReason
from .errors import PyllavaError

Mask: TypeAlias = npt.NDArray[np.uint32]

_log = logging.getLogger("pyllava")

_AGAIN = 16  # tokens after which a search that found nothing is tried again, then twice as many, and so on


@dataclass(frozen=True)
class Vocabulary:
    """Tokens as bytes, and the other way round, for one model."""

    model: _lib.ModelHandle
    pieces: list[bytes]
    n_words: int
    """Of a mask, each of 32 tokens."""
    end: int
    """A token that ends an answer."""
    tokenize: Callable[[bytes], list[int]]


class Constraint:
    """How far an answer is in its grammar, and what it has to go on with.

    `matcher` reads tokens, `letters` the same text byte by byte; both have read `start`. `ends` finds ways to the end,
    the first of which is `closing`, or None.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        matcher: Any,
        letters: Any,
        ends: Ends,
        closing: bytes | None,
        *,
        start: bytes = b"",
        space: str = "",
    ) -> None:
        self._vocabulary, self._matcher, self._letters, self._ends = vocabulary, matcher, letters, ends
        self._text = start
        self.pending: list[int] = []
        """Tokens that come next whatever the model says; the matcher has read them."""
        self.space = space
        """What may stand before the answer, and is no part of it."""
        self.n_forced = 0
        self.reason: FinishReason | None = None
        """Why the answer is being closed, or was."""
        self._closing: list[int] | None = None
        self._way = b""  # the bytes of `_closing`
        self._wait, self._pause = 0, _AGAIN  # tokens before another search, and after it
        self.pending = self._read_forced(matcher, letters)
        given = self._bytes(self.pending)
        self._text += given
        if closing is not None and closing.startswith(given):
            self._set_closing(closing[len(given) :])

    def begin(self, room: int) -> None:
        """Called before the first token: without room for the shortest answer, none is kept for its end."""
        if self._closing is None or len(self.pending) + len(self._closing) <= room:
            return
        found, _ = self._ends.shortest(self._letters, self._text)
        if found is not None:
            self._set_closing(found)
        n = len(self.pending) + len(self._closing)
        if n > room:
            self._closing = None
            self._put_off()
            _log.warning(
                "max_tokens=%d: the shortest answer that was found for the grammar takes %d tokens", room, n
            )

    @property
    def is_whole(self) -> bool:
        """Whether the answer may end here."""
        return not self.pending and bool(self._matcher.is_accepting())

    @property
    def needs_choice(self) -> bool:
        """Whether something is left to choose after what is pending."""
        return self.reason is None and not self._matcher.is_stopped()

    @property
    def n_ahead(self) -> int:
        """Rows after which something is to be chosen: that of the last token, and of those pending."""
        return len(self.pending) + (1 if self.needs_choice or not self.pending else 0)

    def choose(self, logits: _lib.FloatArray, sampler: _lib.SamplerHandle, n: int, room: int) -> _lib.Choice:
        """The next token, for which a row of logits is given, with `n` alternatives; `room` tokens may follow it."""
        if self.pending:
            return self._take(logits, sampler, n)
        choice = sampler.sample(logits, mask=self._mask(), n_alternatives=n)
        if self._vocabulary.model.is_end(choice.id) or self._advance(choice.id, room):
            return choice
        self.close("length")
        if self.pending:
            return self._take(logits, sampler, n)
        return sampler.take(logits, self._vocabulary.end, n_alternatives=n)

    def ending(self, reason: FinishReason | None) -> FinishReason | None:
        """Why the answer ends with the token that was chosen; `reason`: why it would without a grammar."""
        if reason in ("timeout", "loop") and self.reason is None and self._closing is not None:
            self.close(reason)
        elif reason is not None and not (self.reason and self.pending and reason != "length"):
            return self.reason or ("stop" if self.is_whole and self._matcher.is_stopped() else reason)
        if self.pending or self.needs_choice:
            return None
        return self.reason or "stop"

    def close(self, reason: FinishReason) -> None:
        """The shortest way to the end comes next, and nothing else."""
        assert self._closing is not None
        self.reason = reason
        self.pending += self._closing
        self._matcher.consume_tokens(self._closing)
        self._closing, self._way = [], b""

    def _take(self, logits: _lib.FloatArray, sampler: _lib.SamplerHandle, n: int) -> _lib.Choice:
        """A pending token, as the sampler's only choice: it has its probability, and counts for the penalties."""
        self.n_forced += 1
        return sampler.take(logits, self.pending.pop(0), n_alternatives=n)

    def _mask(self) -> Mask:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._vocabulary.n_words]
        self._check(words.any())
        return words

    def _check(self, goes_on: object) -> None:
        if self._matcher.is_error() or not goes_on:
            raise PyllavaError(
                f"the grammar gave up: {reason_of(self._matcher) or 'it allows no token here'}"
            )

    def _bytes(self, tokens: list[int]) -> bytes:
        return b"".join(self._vocabulary.pieces[token] for token in tokens)

    def _read_forced(self, matcher: Any, letters: Any) -> list[int]:
        """Reads the tokens that the grammar forces, in the model's own way to cut the text."""
        forced: list[int] = matcher.compute_ff_tokens()
        if forced and matcher.validate_tokens(forced) == len(forced):
            matcher.consume_tokens(forced)
            read(letters, self._bytes(forced))
            return forced
        return []

    def _advance(self, token: int, room: int) -> bool:
        """Reads a token; False, with nothing changed, if no way to the end would fit into the room behind it."""
        matcher, letters = self._matcher.deep_copy(), self._letters.deep_copy()
        matcher.consume_token(token)
        if matcher.is_error():
            raise PyllavaError(f"the grammar gave up: {reason_of(matcher)}")
        read(letters, self._vocabulary.pieces[token])
        forced = self._read_forced(matcher, letters)
        before = self._matcher, self._letters, self._text, self._closing, self._way
        new = self._bytes([token, *forced])
        self._matcher, self._letters, self._text = matcher, letters, self._text + new
        if self._find_closing(new, room - len(forced)):
            self.pending = forced
            return True
        self._matcher, self._letters, self._text, self._closing, self._way = before
        return False

    def _find_closing(self, new: bytes, room: int) -> bool:
        """Finds a way to the end after `new` was read; False if the one before it must be taken."""
        closing, self._closing = self._closing, None
        if closing is None and self._wait > 0:
            self._wait -= 1
            return True
        for way in (self._way[len(new) :] if self._way.startswith(new) else None, self._way):
            if closing is not None and way is not None and self._fits(way, room):
                return True
        is_certain = True
        for search in (self._ends.first, self._ends.shortest):
            found, is_certain = search(self._letters, self._text)
            if found is not None and self._fits(found, room):
                return True
        self._closing = None
        self._put_off()
        return closing is None or not (is_certain or room <= 2 * len(closing) + _AGAIN)

    def _put_off(self) -> None:
        self._wait, self._pause = self._pause, 2 * self._pause

    def _fits(self, way: bytes, room: int) -> bool:
        return self._set_closing(way) and len(self._closing or ()) <= room

    def _set_closing(self, way: bytes) -> bool:
        """Takes a way to the end, if it is one from here."""
        tokens = self._vocabulary.tokenize(way) if way else []
        end = self._matcher.deep_copy()
        if tokens and end.try_consume_tokens(tokens) != len(tokens):
            return False
        if not end.is_accepting():
            return False
        self._closing, self._way = tokens, way
        return True


def read(letters: Any, text: bytes) -> None:
    """Has a matcher over bytes read a text."""
    if text:
        letters.consume_tokens([*text])


_NO_WAY_ON = "NoExtensionBias"  # what llguidance says of a rule that is nothing but itself


def reason_of(matcher: Any) -> str:
    """What a matcher says went wrong, in one line."""
    text = str(matcher.get_error()).split("<state>")[0].split("<non-verbose/>")[0].split("<backtrace>")[0]
    reason = " ".join(text.split())[:300]
    return "no text satisfies it" if reason == _NO_WAY_ON else reason
