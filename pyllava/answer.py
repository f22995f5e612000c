"""What comes back from a question: the answer, whole or as a stream, and what it cost."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "loop", "timeout"]


@dataclass(frozen=True)
class Usage:
    """Positions of the prompt and tokens of the answer."""

    image_tokens: int
    """Rows that images took in the prompt."""
    text_tokens: int
    """Token ids in the prompt, the beginning-of-sequence token included."""
    cached_tokens: int
    """Positions of the prompt that were still there from an earlier call and were not computed again."""
    completion_tokens: int
    """Tokens sampled for the answer, without the one that ended it."""
    image_tokens_each: tuple[int, ...] = ()
    """`image_tokens` per image."""
    forced_tokens: int = 0
    """Of `completion_tokens`, those that a grammar left no choice about: many of them are computed in one step."""

    @property
    def prompt_tokens(self) -> int:
        """`image_tokens` + `text_tokens`."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds. `load` is that of the model, whenever it happened; the others are of this answer.

    Other answers may be computed in the same steps: they are part of these times.
    """

    load: float
    encode: float
    """Until its images were encoded."""
    prefill: float
    """From the first row of the prompt that was computed to the first token."""
    decode: float
    """From the first token to the last."""
    wait: float = 0.0
    """Until the first row of the prompt was computed: others came first."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, or an alternative to one, and how probable the model finds it."""

    token: str
    """Its text; a character of which it is only a part shows as U+FFFD."""
    id: int
    bytes: bytes
    """The exact bytes of its text."""
    logprob: float
    """The natural logarithm of its probability at temperature 1, before any stage of the sampler."""
    alternatives: tuple[TokenLogprob, ...] = ()
    """The tokens that the model finds most probable in its place, descending; it may be among them."""


class StreamPiece(str):
    """A piece of an answer's text, from its stream."""

    n_tokens: int
    """How many tokens the model had chosen when this could be shown."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Entries for the tokens since the piece before it, if ``ask(logprobs=N)`` asked for them."""

    @classmethod
    def of(cls, text: str, n_tokens: int) -> StreamPiece:
        piece = cls(text)
        piece.n_tokens = n_tokens
        return piece


@dataclass(frozen=True)
class Answer:
    """An answer; ``str(answer)`` is its text, without surrounding white space."""

    text: str
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    """"stop": the model ended it, or a stop string; "length": max_tokens or the context was used up; "loop": it repeated
    itself (`stop_loops`); "timeout": its seconds were over."""
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    """The natural logarithm of each token's probability in the model, before any stage of the sampler."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """An entry for each of `tokens`, with as many alternatives as ``ask(logprobs=N)`` asked for; without it, none."""
    data: Any = field(default=None, hash=False)
    """Of a structured answer: what its JSON says, an instance of the pydantic model that was given, or the text that the
    grammar allows. None where the answer was cut before its end, and where no structure was asked for."""

    def __str__(self) -> str:
        return self.text

    def html(self) -> str:
        """The answer as HTML; with ``logprobs`` its tokens in colours, and their alternatives as tooltips."""
        from ._token_colors import answer_html

        return answer_html(self)

    def _repr_html_(self) -> str:  # what a notebook shows
        return self.html()

    @property
    def was_cut(self) -> bool:
        """Of a structured answer: it ended before it was whole, and has no `data`."""
        return self.data is None and self.text != "null"


class Stream:
    """An answer in the making: iterate over it for its pieces of text, whose sum is ``stream.answer.text``.

    Computing starts with the first piece, stays a little ahead of the reader, and stops while nobody reads.
    `usage` is known before the first piece (but for the answer's own tokens), `answer` after the last.
    close(), or the end of a ``with`` statement, gives up what is left. One thread at a time may read it.
    """

    def __init__(
        self,
        usage: Usage,
        pieces: Generator[str, None, Answer],
        cancel: Callable[[], None] | None = None,
        watch: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.usage = usage
        self._pieces = pieces
        self._cancel = cancel
        self._watch = watch
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._answer = end.value or self._answer
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream; if it is unfinished, it has no `answer`. A second call does nothing.

        A thread that is waiting for a piece gets GenerationCancelled.
        """
        try:
            self._pieces.close()
        except ValueError:  # it is being read
            if self._cancel is not None:
                self._cancel()

    def never_waits(self, notify: Callable[[], None]) -> None:
        """Before the first piece: from now on a piece that is not there yet is "", and `notify` is called, in another
        thread, when there may be one, or the end.
        """
        assert self._watch
        self._watch(notify)

    def whole(self) -> Answer:
        """Takes all that is left, and gives the whole answer."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises ValueError before the last piece has been taken."""
        if self._answer is None:
            raise ValueError("the answer is not finished: iterate to its end first")
        return self._answer


class Transcript:
    """Turns token bytes into text that can be shown at once.

    Held back are: bytes of an unfinished character, white space at either end, and anything that may be the
    start of a stop string. A stop string ends the text before it. `exact`: white space is shown, too, but for this one
    at the beginning.
    """

    def __init__(self, stop: Sequence[str], *, exact: str | None = None) -> None:
        self._exact = exact
        self._stop = [s for s in stop if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._started = False
        self.text = ""
        self.stopped = False

    @property
    def has_stops(self) -> bool:
        """True if a stop string could end the text."""
        return bool(self._stop)

    def push(self, piece: bytes) -> str:
        """Adds the bytes of a token; returns the text that can be shown now."""
        return self._release(self._decoder.decode(piece), final=False)

    def finish(self) -> str:
        """Ends the text; returns what was held back."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [at for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            held, self.stopped, final = held[: min(found)], True, True
        if not self._started:
            held = held.lstrip() if self._exact is None else held.removeprefix(self._exact)
        keep = 0 if final else self._uncertain(held)
        shown = held[: len(held) - keep]
        if self._exact is None:
            shown = shown.rstrip()
        self._held = "" if final else held[len(shown) :]
        self._started = self._started or bool(shown)
        self.text += shown
        return shown

    def _uncertain(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop string."""
        return max((_overlap(held, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it: no more is looked at than `text`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
