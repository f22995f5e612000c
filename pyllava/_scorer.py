"""How probable the model finds given answers, and what that makes of a choice between them.

The prompt with its pictures is computed once; each answer adds its own rows alone, as rows of an answer: so the numbers are
those that an answer reports of its tokens when it is generated.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from . import _lib, templates
from ._embeddings import ImageEmbedding
from ._engine import Engine
from ._lib.values import number_text
from ._prompt import Prompt, Prompts, checked_ids, joined
from ._request import Epoch, Given
from ._script import Script
from .answer import Answer, Timings, TokenLogprob, Usage
from .images import ImageSource
from .sampling import check_texts
from .templates import ImageMark, Part, Text

Normalize: TypeAlias = Literal["sum", "mean"]
Floats: TypeAlias = npt.NDArray[np.float64]
Pictures: TypeAlias = Sequence["ImageSource | ImageEmbedding"]


@dataclass(frozen=True)
class Loglikelihood:
    """How probable the model finds an answer."""

    logprob: float
    """The natural logarithm of the answer's probability: the sum over `logprobs`, and `end_logprob` where the end counts."""
    logprobs: tuple[TokenLogprob, ...]
    """An entry for each token, with as many alternatives as were asked for."""
    end_logprob: float | None = None
    """That of the answer's end behind its last token; None where the end does not count."""

    @property
    def mean(self) -> float:
        """`logprob` per token, the end counted as one where it counts."""
        return self.logprob / (len(self.logprobs) + (self.end_logprob is not None))


class Scores(dict[str, float]):
    """The probability of each choice, given that one of them is the answer: the values sum to one."""

    def __init__(
        self,
        probabilities: Mapping[str, float],
        loglikelihoods: Mapping[str, Loglikelihood],
        usage: Usage,
        timings: Timings,
    ) -> None:
        super().__init__(probabilities)
        self.loglikelihoods = loglikelihoods
        """Of each choice in the model, whatever the others are."""
        self.usage, self.timings = usage, timings

    @property
    def best(self) -> str:
        """The likeliest choice; of equal ones the first."""
        return max(self, key=lambda choice: self[choice])

    @property
    def answer(self) -> Answer:
        """The likeliest choice as an answer. Its timings: `prefill` until the prompt was computed, `decode` for the choices."""
        entries = self.loglikelihoods[self.best].logprobs
        ids, log_probs = (tuple(e.id for e in entries), tuple(e.logprob for e in entries))
        return Answer(self.best, self.usage, self.timings, "stop", ids, log_probs, entries)


@dataclass(frozen=True)
class Question:
    """A question without its answer."""

    text: str
    images: Pictures
    start_with: str = ""
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.start_with, str):
            raise TypeError(f"start_with: found {type(self.start_with).__name__}, need a text")


@dataclass(frozen=True)
class _Answer:
    """An answer as the model would write it."""

    ids: tuple[int, ...]
    ends: frozenset[int] = frozenset()
    """Any of these ends it; empty where the end does not count."""

    def wanted(self) -> list[tuple[int, ...]]:
        """What is asked about after the prompt, and after each of its tokens."""
        ends = [tuple(sorted(self.ends))] if self.ends else []
        return [*((token,) for token in self.ids), *ends]


@dataclass(frozen=True)
class Begun:
    """A prompt that is ready, and the tokens of an answer to it."""

    scorer: Scorer
    prompt: Prompt
    ids: tuple[int, ...]
    text: str
    epoch: Epoch

    def logprobs(self, scripts: Sequence[Script]) -> Floats:
        """The answer's log-probability after each of these instead of the prompt."""
        model, wanted = self.scorer.model, [(token,) for token in self.ids]
        jobs = [Given(script.followed_by(self.ids[:-1]), model, wanted) for script in scripts]
        found = self.scorer.engine.run_all(jobs, self.epoch)
        return np.array([math.fsum(row[0].log_prob for row in rows) for rows in found], np.float64)


class Scorer:
    """Scores answers to questions with one model, template and context."""

    def __init__(self, engine: Engine, prompts: Prompts, n_ctx: int) -> None:
        self.engine, self.model = engine, engine.model
        self._prompts, self._n_ctx = prompts, n_ctx

    def score(
        self,
        question: Question,
        choices: Sequence[str],
        normalize: str,
        *,
        with_end: bool,
        n_alternatives: int = 0,
    ) -> Scores:
        """The probability of each choice, given that one of them is the answer."""
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize: found {normalize!r}, need 'sum' or 'mean'")
        _check_choices(choices)
        found, usage, timings = self._measured(question, choices, with_end, n_alternatives)
        values = [one.mean if normalize == "mean" else one.logprob for one in found]
        shares = dict(zip(choices, softmax(values), strict=True))
        return Scores(shares, dict(zip(choices, found, strict=True)), usage, timings)

    def loglikelihood(
        self, question: Question, answer: str | Sequence[int], *, with_end: bool, n_alternatives: int
    ) -> Loglikelihood:
        """How probable an answer is."""
        return self._measured(question, [answer], with_end, n_alternatives)[0][0]

    def _measured(
        self,
        question: Question,
        answers: Sequence[str | Sequence[int]],
        with_end: bool,
        n_alternatives: int,
    ) -> tuple[list[Loglikelihood], Usage, Timings]:
        """How probable each of the answers is, and what it took."""
        if not 0 <= operator.index(n_alternatives) <= self.model.info.n_vocab:
            raise ValueError(
                f"logprobs: found {number_text(n_alternatives)}, need 0..{self.model.info.n_vocab}, one for each token"
            )
        epoch = self.engine.epoch()
        found = self._answers(question, answers, with_end)
        _check_told_apart(answers, found, with_end)
        prompt = self._prepared(question, max(len(answer.ids) for answer in found), epoch)
        started = time.perf_counter()
        firsts = sorted({token for answer in found for token in answer.wanted()[0]})
        job = Given(prompt.script, self.model, [firsts], n_alternatives)
        known = {choice.id: choice for choice in self.engine.run(job, epoch)[0]}
        begun = time.perf_counter()
        rest = self._rest(prompt.script, found, n_alternatives, epoch)
        timings = Timings(0.0, prompt.encode_seconds, begun - started, time.perf_counter() - begun)
        rows = [
            [tuple(known[token] for token in answer.wanted()[0]), *more]
            for answer, more in zip(found, rest, strict=True)
        ]
        likelihoods = [
            self._loglikelihood(answer, chosen) for answer, chosen in zip(found, rows, strict=True)
        ]
        return likelihoods, prompt.usage(job.n_cached), timings

    def _rest(
        self, script: Script, answers: Sequence[_Answer], n_alternatives: int, epoch: Epoch
    ) -> list[list[tuple[_lib.Choice, ...]]]:
        """What each answer wants to know besides what follows the prompt."""
        wanted = [answer.wanted()[1:] for answer in answers]
        jobs = [
            Given(script.followed_by(answer.ids[: len(rows)]), self.model, rows, n_alternatives)
            for answer, rows in zip(answers, wanted, strict=True)
            if rows
        ]
        found = iter(self.engine.run_all(jobs, epoch))
        return [next(found) if rows else [] for rows in wanted]

    def begin(self, question: Question, answer: str | Sequence[int]) -> Begun:
        """A question and its answer as the model gets them."""
        epoch = self.engine.epoch()
        ids = self._answers(question, [answer], with_end=False)[0].ids
        prompt = self._prepared(question, len(ids), epoch)
        text = b"".join(map(self.model.piece, ids)).decode(errors="replace").strip()
        return Begun(self, prompt, ids, text, epoch)

    def _prepared(self, question: Question, n_answer: int, epoch: Epoch) -> Prompt:
        texts = self._prompts.tokenized(self._begun(question))
        if not texts:
            raise ValueError("empty prompt")
        return self._prompts.prepare(texts, question.images, self._n_ctx - n_answer, epoch)

    def _loglikelihood(self, answer: _Answer, rows: Sequence[tuple[_lib.Choice, ...]]) -> Loglikelihood:
        chosen = [row[0] for row in rows[: len(answer.ids)]]
        entries = tuple(token_logprob(self.model, c.id, c.log_prob, c.alternatives) for c in chosen)
        total = math.fsum(choice.log_prob for choice in chosen)
        if not answer.ends:
            return Loglikelihood(total, entries)
        end = float(np.logaddexp.reduce([choice.log_prob for choice in rows[-1]]))
        return Loglikelihood(total + end, entries, end)

    # --- from texts to tokens ---

    def _parts(self, question: Question) -> list[Part]:
        return self._prompts.parts(question.text, len(question.images), question.raw, question.system)

    def _space(self, question: Question) -> str:
        return "" if question.raw else self._prompts.template.answer_space

    def _begun(self, question: Question) -> list[Part]:
        """The prompt up to where an answer goes on."""
        return templates.begun(self._parts(question), question.start_with.rstrip(" "), self._space(question))

    def _answers(
        self, question: Question, answers: Sequence[str | Sequence[int]], with_end: bool
    ) -> list[_Answer]:
        prompt = self._flat(self._begun(question))
        return [self._answer(question, prompt, answer, with_end) for answer in answers]

    def _answer(
        self,
        question: Question,
        prompt: Sequence[int | ImageMark],
        answer: str | Sequence[int],
        with_end: bool,
    ) -> _Answer:
        """An answer's tokens: those that follow the prompt's where both are written as one text."""
        if isinstance(answer, str):
            text = answer if question.raw else answer.strip()
            if not text.strip():
                raise ValueError(f"answer {answer!r:.80}: empty, need a text")
            whole = templates.begun(self._parts(question), question.start_with + text, self._space(question))
            ids = self._after(prompt, whole)
            if ids is None:
                raise ValueError(
                    f"answer {answer!r:.80}: its beginning and the end of the prompt become one token: "
                    "need a space or a line's end between them, which is the answer's, not the prompt's"
                )
        else:
            whole, ids = [], checked_ids(answer, self.model.info.n_vocab, "answer: ")
            if not ids:
                raise ValueError("answer: no tokens, need one or more")
        ends = self._ends(whole, question.raw) if with_end else frozenset()
        return _Answer(tuple(ids), ends)

    def _flat(self, parts: Sequence[Part]) -> list[int | ImageMark]:
        return joined(self._prompts.tokenized(parts))

    def _after(self, before: Sequence[int | ImageMark], whole: Sequence[Part]) -> list[int] | None:
        """The tokens of `whole` that follow those of `before`; None if it does not begin with these."""
        items = self._flat(whole)
        if items[: len(before)] != list(before):
            return None
        return [item for item in items[len(before) :] if not isinstance(item, ImageMark)] or None

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """The tokens that end any answer."""
        return frozenset(filter(self.model.is_end, range(self.model.info.n_vocab)))

    def _ends(self, whole: Sequence[Part], raw: bool) -> frozenset[int]:
        """The tokens that end an answer: the model's, and the first of what the template has behind answers."""
        template, found = self._prompts.template, set(self._end_tokens)
        if not raw and whole:
            before = self._flat(whole)
            for text in filter(None, {*template.stop, template.answer_suffix.lstrip(" ")}):
                found.update((self._after(before, [*whole, Text(text)]) or [])[:1])
        if not found:
            raise ValueError("with_end: this model has no token that ends an answer")
        return frozenset(found)


def token_logprob(
    model: _lib.ModelHandle, token: int, log_prob: float, others: Sequence[tuple[int, float]] = ()
) -> TokenLogprob:
    """The entry of a token, with its alternatives."""
    piece = model.piece(token, with_special=True)
    alternatives = tuple(token_logprob(model, *other) for other in others)
    return TokenLogprob(piece.decode(errors="replace"), token, piece, log_prob, alternatives)


def softmax(log_values: Sequence[float]) -> list[float]:
    """Probabilities that sum to one, in the ratios of the exponentials."""
    values = np.exp(np.asarray(log_values, np.float64) - np.max(log_values))
    shares: list[float] = (values / values.sum()).tolist()
    return shares


def _check_choices(choices: Sequence[str]) -> None:
    check_texts("choices", choices)
    if len(choices) < 2:
        raise ValueError(f"choices: found {len(choices)}, need 2 or more")


def _check_told_apart(
    answers: Sequence[str | Sequence[int]], found: Sequence[_Answer], with_end: bool
) -> None:
    """Of answers that are scored together each must be another outcome."""
    known: dict[tuple[int, ...], str | Sequence[int]] = {}
    for answer, one in zip(answers, found, strict=True):
        if one.ids in known:
            raise ValueError(
                f"choices {known[one.ids]!r:.80} and {answer!r:.80}: the same answer, need different ones"
            )
        known[one.ids] = answer
    if with_end:
        return
    for ids, answer in known.items():
        for n in range(1, len(ids)):
            if ids[:n] in known:
                raise ValueError(
                    f"choices: {answer!r:.80} begins with {known[ids[:n]]!r:.80}, so whatever is the one is the other "
                    "too: with_end=True tells them apart"
                )
