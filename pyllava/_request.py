"""Requests to the engine, and the progress of each.

A request is used by two threads. The client makes it, reads `events` and sets the attributes marked as the
client's; all else is the engine's. Nothing here takes a lock: queues and single attributes are enough.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from . import _lib
from ._constraint import Constraint
from ._loops import LoopDetector
from ._script import Piece, Script
from .answer import FinishReason, StreamPiece, Transcript

T = TypeVar("T")
FloatArray: TypeAlias = npt.NDArray[np.float32]
Sampler: TypeAlias = Callable[[], _lib.SamplerHandle]
Alternatives: TypeAlias = tuple[tuple[int, float], ...]  # (id, log_prob)
_ALTERNATIVES = 1 << 16  # that one call has room for, of an answer
_FIRST_STEPS = 16  # steps at once after a prompt, if a stop string may make the rest useless
_FORCED_ROWS = 16  # of an answer in one step
_UNREAD = 64  # pieces of text that wait for a reader, at most


class Epoch:
    """Jobs that one word ends. `within`: it ends with that epoch, too."""

    def __init__(self, within: Epoch | None = None) -> None:
        self._within = within
        self._has_ended = False

    def end(self) -> None:
        self._has_ended = True

    @property
    def is_over(self) -> bool:
        return self._has_ended or (self._within is not None and self._within.is_over)


class Job(Generic[T]):
    """Work for the engine, which puts its results into `events`; the last is Ended or an exception."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.epoch = Epoch()  # the engine's, when the client began
        self.notify: Callable[[], None] | None = None  # the client's, called for each event by the engine
        self.is_cancelled = False  # the client's
        self.watch: weakref.ref[object] | None = None  # its callback tells that the client is gone
        self.submitted = 0.0  # when the client began to wait
        self.number = -1  # in order of arrival
        self.is_done = False

    def finish(self, result: object) -> None:
        self._end(Ended(result))

    def fail(self, error: BaseException) -> None:
        self._end(error)

    def _end(self, event: object) -> None:
        self.is_done = True
        self.let_go()
        self._put(event)

    def _put(self, event: object) -> None:
        self.events.put(event)
        if self.notify is not None:
            self.notify()

    def let_go(self) -> None:
        """Frees the job's C objects; runs in the engine's thread, where no interrupt can occur."""


@dataclass(frozen=True)
class Ended:
    """The last event of a job that went well."""

    result: Any


class Call(Job[T]):
    """A function to be run in the engine's thread while nothing else is."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__()
        self.function = function


class Encode(Job[T]):
    """Views of one picture to encode: float32 [n_views, 3, S, S]. `merge` makes the result from features.

    `keep`: the result is kept for later questions about the same picture.
    """

    def __init__(
        self, content: bytes, pixels: FloatArray, merge: Callable[[FloatArray], T], *, keep: bool = True
    ) -> None:
        super().__init__()
        self.content = content
        self.keep = keep
        self.pixels = pixels
        self.merge = merge
        self.features: list[FloatArray] = []

    @property
    def n_encoded(self) -> int:
        return sum(map(len, self.features))


class Request(Job[T]):
    """A script to be computed, and the wanted result."""

    def __init__(self, script: Script, *, reuse: bool) -> None:
        super().__init__()
        self.script = script
        self.reuse = reuse
        self.begun: float | None = None
        self.seq = -1  # where it is computed; -1: it waits
        self.n_held = 0  # rows of the script that are computed there
        self.n_cached = 0  # rows that were reused when it began
        self.is_parked = False  # set aside because its reader is slow

    @property
    def n_left(self) -> int:
        """Rows to be computed before the first choice."""
        return len(self.script) - self.n_held

    @property
    def n_rows(self) -> int:
        """Rows that its sequence holds while nothing is being computed."""
        return self.n_held

    @property
    def most_reused(self) -> int:
        """The most rows of the script that may be reused: the last one has to be computed."""
        return len(self.script) - 1 if self.reuse else 0

    def prepare(self) -> None:
        """Creates what the request needs before it has a sequence."""

    def begin(self, seq: int, n_held: int) -> None:
        """Gives it a sequence, which holds the first `n_held` rows of its script."""
        if self.begun is None:
            self.begun, self.n_cached = time.perf_counter(), n_held
        self.seq, self.n_held = seq, n_held

    def run(self, piece: Piece) -> _lib.Run:
        """The next rows of the script, as a part of a step."""
        raise NotImplementedError

    def took(self, piece: Piece, ran: _lib.Ran) -> None:
        """Takes the results of a piece that has been computed."""
        raise NotImplementedError


class Score(Request[FloatArray]):
    """Logits of every row of a script."""

    def __init__(self, script: Script, n_vocab: int) -> None:
        super().__init__(script, reuse=False)
        self.logits = np.empty((len(script), n_vocab), np.float32)

    def run(self, piece: Piece) -> _lib.Run:
        return _lib.Run(piece.spans, self.seq, append=True, answer=piece.answer, first=0)

    def took(self, piece: Piece, ran: _lib.Ran) -> None:
        self.logits[self.n_held : self.n_held + piece.n] = ran.logits
        self.n_held += piece.n
        if self.n_left == 0:
            self.finish(self.logits)


class Given(Request[list[tuple[_lib.Choice, ...]]]):
    """Log-probabilities of given tokens after each of the last rows of a script.

    `wanted`: for each of these rows, the tokens that are asked about. The sampler that chooses the tokens of answers
    tells how probable each is, so these are the numbers that an answer reports. No more logits are held than
    those of the rows of one step.
    """

    def __init__(
        self,
        script: Script,
        model: _lib.ModelHandle,
        wanted: Sequence[Sequence[int]],
        n_alternatives: int = 0,
    ) -> None:
        super().__init__(script, reuse=True)
        self._model = model
        self._wanted = wanted
        self._n_alternatives = n_alternatives
        self._found: list[tuple[_lib.Choice, ...]] = [()] * len(wanted)
        self._sampler: _lib.SamplerHandle | None = None

    @property
    def most_reused(self) -> int:
        """The rows before the first that is asked about."""
        return len(self.script) - len(self._wanted)

    def prepare(self) -> None:
        self._sampler = self._sampler or _lib.SamplerHandle(self._model)

    def let_go(self) -> None:
        self._sampler = None

    def run(self, piece: Piece) -> _lib.Run:
        first = max(0, self.most_reused - self.n_held)
        first = first if first < piece.n else _lib.NOTHING
        return _lib.Run(piece.spans, self.seq, append=True, answer=piece.answer, first=first)

    def took(self, piece: Piece, ran: _lib.Ran) -> None:
        self.n_held += piece.n
        row = self.n_held - len(ran.logits) - self.most_reused
        assert self._sampler is not None
        for i, logits in enumerate(ran.logits, row):
            self._found[i] = tuple(
                self._sampler.take(logits, token, n_alternatives=self._n_alternatives)
                for token in self._wanted[i]
            )
        if self.n_left == 0:
            self.finish(self._found)


@dataclass(frozen=True)
class Written:
    """An answer as the engine has made it."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    alternatives: tuple[Alternatives, ...]
    """Of each token."""
    reason: FinishReason
    n_cached: int
    wait: float
    """Seconds from the question to the first row that was computed for it."""
    prefill: float
    """Seconds from there to the first token."""
    decode: float
    """Seconds from the first token to the last."""
    n_set_aside: int
    n_forced: int
    """Tokens that the grammar left no choice about."""
    is_whole: bool
    """The grammar is satisfied; False without one."""


@dataclass(frozen=True)
class Limits:
    """What an answer begins with, and what ends it besides its own end, stop texts and the number of its tokens."""

    start: str = ""
    """A text that stands at the end of the prompt and is the answer's beginning."""
    seconds: float = float("inf")
    """From the first row that is computed for it."""
    no_loops: bool = False
    """It ends when it repeats itself."""
    exact: str | None = None
    """With a text: white space at its ends is a part of it, but for this one at its beginning."""
    constraint: Constraint | None = None
    """The grammar that says what it may go on with. The logits of its rows are read, instead of C's choices."""


class Answering(Request[Written]):
    """An answer that is being generated."""

    def __init__(
        self,
        script: Script,
        model: _lib.ModelHandle,
        sampler: Sampler,
        stop: Sequence[str],
        most: int,
        *,
        reuse: bool,
        stream: bool,
        limits: Limits | None = None,
        n_alternatives: int = 0,
    ) -> None:
        """`stop`: texts that end it. `most`: tokens at most. `stream`: its pieces of text become events.
        `n_alternatives`: those that are told of each token.
        """
        super().__init__(script, reuse=reuse)
        self.stream = stream
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.alternatives: list[Alternatives] = []
        self.n_prompt = len(script)
        self.n_taken = 0  # pieces that the client has taken
        self.n_set_aside = 0
        self._n_put = 0
        self._prompt = script
        self._make_sampler = sampler
        self._sampler: _lib.SamplerHandle | None = None
        self._model = model
        self._most = most
        self._limits = limits or Limits()
        self._constraint = self._limits.constraint
        exact = self._limits.exact if self._constraint is None else self._constraint.space
        self._transcript = Transcript(stop, exact=exact)
        if self._constraint is not None:
            self._constraint.begin(most)
        self._loops = LoopDetector() if self._limits.no_loops else None
        self._n_alternatives = n_alternatives
        self._first_token = self._last_token = 0.0

    @property
    def is_answering(self) -> bool:
        """True: the next step appends its last token; False: rows of the script come before that."""
        return self.seq >= 0 and self.n_left == 0

    @property
    def is_unread(self) -> bool:
        """True if many pieces wait for the reader."""
        return self._n_put - self.n_taken >= _UNREAD

    @property
    def needs_text(self) -> bool:
        """True if few pieces wait for the reader of a parked answer."""
        return self._n_put - self.n_taken <= _UNREAD // 2

    def set_aside(self) -> None:
        """Called when it has lost its sequence: its rows must be computed again; the chosen tokens stay."""
        self.seq = -1
        self.n_held = 0
        self.script = self._prompt.followed_by(self.tokens)

    def run(self, piece: Piece) -> _lib.Run:
        is_last = piece.n == self.n_left
        return _lib.Run(
            piece.spans,
            self.seq,
            append=True,
            answer=piece.answer,
            first=_lib.LAST if is_last else _lib.NOTHING,
            sampler=self._sampler if is_last and not self.is_constrained else None,
            n_alternatives=self._n_alternatives if is_last and not self.is_constrained else 0,
        )

    @property
    def is_constrained(self) -> bool:
        return self._constraint is not None

    @property
    def n_next(self) -> int:
        """Rows that it appends in a step: its last token and those that are certain to follow."""
        return 1 if self._constraint is None else min(_FORCED_ROWS, self._constraint.n_ahead)

    def next_run(self) -> _lib.Run:
        """The run that appends its last token in a step, and what is certain to follow."""
        if self._constraint is not None:
            ids = [self.tokens[-1], *self._constraint.pending][: self.n_next]
            return _lib.Run([_lib.Tokens(ids)], self.seq, append=True, answer=True, first=0)
        return _lib.Run(
            [_lib.Tokens(self.tokens[-1:])],
            self.seq,
            append=True,
            answer=True,
            sampler=self._sampler,
            n_alternatives=self._n_alternatives,
        )

    def let_go(self) -> None:
        self._sampler = None

    @property
    def n_rows(self) -> int:
        return self.n_kept if self.is_answering else self.n_held

    @property
    def most_reused(self) -> int:
        """Once begun, it may always reuse rows that it has computed itself."""
        return len(self.script) - 1 if self.reuse or self.begun is not None else 0

    def prepare(self) -> None:
        if self._sampler is None:
            self._sampler = self._make_sampler()
        if self._limits.start and self.begun is None:
            self._show(self._transcript.push(self._limits.start.encode()))

    @property
    def n_steps(self) -> int:
        """Steps worth computing at once; if a stop string may end the answer, at most a few times those done."""
        left = self._most - len(self.tokens)
        left = min(left, max(1, _ALTERNATIVES // max(1, self._n_alternatives)))
        return min(left, max(_FIRST_STEPS, 4 * len(self.tokens))) if self._transcript.has_stops else left

    def took(self, piece: Piece, ran: _lib.Ran) -> None:
        self.n_held += piece.n
        self.went_on(ran)

    def went_on(self, ran: _lib.Ran) -> None:
        """Takes what a step has found: a choice, or logits to choose from."""
        if ran.choice is not None:
            self.chose([ran.choice])
        elif self._constraint is not None and (sampler := self._sampler) is not None:
            for logits in ran.logits:
                room = self._most - len(self.tokens) - 1
                if not self.is_done:
                    self._chose(self._constraint.choose(logits, sampler, self._n_alternatives, room))

    def chose(self, choices: Sequence[_lib.Choice]) -> None:
        """Takes the tokens that follow; those after the end of the answer are ignored."""
        for choice in choices:
            if self.is_done:
                return
            self._chose(choice)

    def _chose(self, choice: _lib.Choice) -> None:
        token = choice.id
        self._last_token = time.perf_counter()
        self._first_token = self._first_token or self._last_token
        if self._model.is_end(token):
            self._close((self._constraint and self._constraint.reason) or "stop")
            return
        self.tokens.append(token)
        self.log_probs.append(choice.log_prob)
        self.alternatives.append(choice.alternatives)
        self._show(self._transcript.push(self._model.piece(token)))
        reason = self._reason()
        if self._constraint is not None:
            reason = self._constraint.ending(reason)
        if reason is not None:
            self._close(reason)

    def _reason(self) -> FinishReason | None:
        """Why the answer ends with its last token."""
        if self._transcript.stopped:
            return "stop"
        if len(self.tokens) >= self._most:
            return "length"
        if self._loops is not None and self._loops.push(self.tokens):
            return "loop"
        if self._last_token - (self.begun or self._last_token) > self._limits.seconds:
            return "timeout"
        return None

    def _show(self, piece: str) -> None:
        if piece and self.stream:
            self._put(StreamPiece.of(piece, len(self.tokens)))
            self._n_put += 1

    def _close(self, reason: FinishReason) -> None:
        self._show(self._transcript.finish())
        assert self.begun is not None
        self.finish(
            Written(
                text=self._transcript.text,
                tokens=tuple(self.tokens),
                log_probs=tuple(self.log_probs),
                alternatives=tuple(self.alternatives),
                reason=reason,
                n_cached=self.n_cached,
                wait=self.begun - self.submitted,
                prefill=self._first_token - self.begun,
                decode=self._last_token - self._first_token,
                n_set_aside=self.n_set_aside,
                n_forced=0 if self._constraint is None else self._constraint.n_forced,
                is_whole=self._constraint is not None and self._constraint.is_whole,
            )
        )

    @property
    def n_kept(self) -> int:
        """Rows that its sequence keeps: all but the last token, which may or may not be there."""
        return self.n_prompt + max(0, len(self.tokens) - 1)
