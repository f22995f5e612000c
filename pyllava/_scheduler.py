"""What is computed next: a turn after the other, a token of every answer and the next rows of waiting prompts.

All of it runs in the engine's thread.
"""

from __future__ import annotations

import bisect
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from . import _lib
from ._picture_cache import PictureCache
from ._request import Answering, Encode, Job, Request
from ._script import Piece
from ._sequences import Sequences
from .errors import GenerationCancelled, PyllavaError

T = TypeVar("T")

_PIECE = 128  # rows of prompts in a step beside answers; more if they take _PIECE_SECONDS at most
_PIECE_SECONDS = 0.05
_ROWS_OF_ANSWER = 8  # one row of an answer costs as much as so many of a prompt
_STEPS, _STEPS_SHOWN = 0.03, 0.01  # seconds of steps in one call of C; if a stream is read
_MARGIN = 32  # free cells that each answer needs before another one is begun
_SHARED = 64  # common rows for which a prompt waits for another one


@dataclass(frozen=True)
class Stats:
    """What a model is doing, and what it has done so far."""

    waiting: int
    """Answers that have not begun, that were set aside, or whose readers are slow."""
    running: int
    """Answers under way."""
    kv_cells: int
    """Positions that the KV cache has for all of them."""
    kv_cells_used: int
    """Of these, positions of answers under way and of earlier ones, kept for prompts that begin alike."""
    prompt_tokens: int
    """Positions of prompts, images among them, that were computed."""
    cached_tokens: int
    """Positions of prompts that were there already."""
    completion_tokens: int
    """Tokens of answers."""
    set_aside: int
    """How often an answer had to let go of its positions, which are computed again later."""
    image_cache_bytes: int
    """Bytes of image embeddings that are kept for questions about the same pictures (`image_cache_bytes`)."""
    image_cache_hits: int
    """How often a picture's embedding was there already."""
    image_cache_misses: int
    """How often it had to be computed; with those of batches, which are not kept."""


@dataclass
class _Counts:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    set_aside: int = 0
    free: int = 0


_Part: TypeAlias = tuple[Any, Piece | None]
"""A request in a step: the next rows of its script, or None: the last token of its answer."""


_Result: TypeAlias = tuple[Any, Piece | None, _lib.Ran]
"""What a step has computed for one of its parts."""


class Scheduler:
    """Jobs of one session, first come, first served, `n_parallel` requests at a time.

    `is_cancelled` tells whether nobody wants a job any more, `tell` who asks of progress: False ends what reports.
    """

    def __init__(
        self,
        session: _lib.SessionHandle,
        sequences: Sequences,
        n_parallel: int,
        n_batch: int,
        cache_bytes: int,
        is_cancelled: Callable[[Job[Any]], bool],
        tell: Callable[[str, float], bool],
    ) -> None:
        self.session = session
        self.sequences = sequences
        self.n_parallel, self.n_batch = n_parallel, n_batch
        self._is_cancelled, self._tell = is_cancelled, tell
        self.embeddings = PictureCache(cache_bytes)
        self.jobs: list[Job[Any]] = []  # all of them, wherever they are; in order of arrival, as the others
        self._pictures: list[Encode[Any]] = []
        self._waiting: list[Request[Any]] = []
        self._active: list[Request[Any]] = []
        self._parked: list[Request[Any]] = []
        self._may_begin = False  # something has changed for waiting requests
        self.computing: Sequence[Job[Any]] = ()  # cancelling one of them interrupts C
        self._rows_per_second = 0.0  # of prompts, in the last step that had any
        self._share = (0.0, 1.0)  # of the reported progress: where it begins, how much it is
        self._stop: BaseException | None = None  # what the progress callback has raised, or its refusal
        self._counts = _Counts(free=sequences.n_cells)
        session.set_progress(self._report)

    @property
    def has_work(self) -> bool:
        """False: a turn would do nothing, until something comes in."""
        return bool(self._pictures or self._active or self._waiting)

    def add(self, job: Encode[Any] | Request[Any]) -> None:
        """A job that has come in."""
        self.jobs.append(job)
        if isinstance(job, Encode):
            self._pictures.append(job)
        else:
            self._wait(job)

    def stats(self) -> Stats:
        """Numbers that may be a turn old."""
        counts, n_cells = self._counts, self.sequences.n_cells
        return Stats(
            waiting=len(self._waiting) + len(self._parked),
            running=len(self._active),
            kv_cells=n_cells,
            kv_cells_used=n_cells - counts.free,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            completion_tokens=counts.completion_tokens,
            set_aside=counts.set_aside,
            image_cache_bytes=self.embeddings.n_bytes,
            image_cache_hits=self.embeddings.n_hits,
            image_cache_misses=self.embeddings.n_misses,
        )

    def turn(self) -> None:
        """Runs a turn. If it fails itself, e.g. for lack of memory, the running jobs end and nothing else."""
        try:
            self._drop_cancelled()
            self._turn()
        except BaseException as error:
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        at_rest = [*self._waiting, *self._parked]
        self._active, self._pictures = [], []
        for job in [job for job in self.jobs if job not in at_rest]:
            job.fail(_copy_of(error))
            self.jobs.remove(job)
        self.sequences.leave_all()
        self._may_begin = True

    def end(self, error: Callable[[], BaseException]) -> None:
        """All jobs fail."""
        for job in self.jobs:
            job.fail(error())
        self.jobs, self._waiting, self._active, self._parked, self._pictures = [], [], [], [], []
        self.embeddings.clear()

    def _wait(self, request: Request[Any]) -> None:
        bisect.insort(self._waiting, request, key=lambda other: other.number)
        self._may_begin = True

    def fail(self, job: Job[Any], error: BaseException) -> None:
        """Ends a job."""
        job.fail(error)
        self._remove(job)

    def _remove(self, job: Job[Any]) -> None:
        """Removes a finished job; its sequence keeps its rows for others."""
        for jobs in (self.jobs, self._pictures, self._active, self._waiting, self._parked):
            if job in jobs:
                cast("list[Any]", jobs).remove(job)
        if isinstance(job, Request):
            job.is_parked = False
            if job.seq >= 0:
                self._leave(job)
        self._may_begin = True

    def _leave(self, request: Request[Any]) -> None:
        n = request.n_kept if isinstance(request, Answering) else None
        self.sequences.leave(request.seq, n)
        request.seq = -1

    def _drop_cancelled(self) -> None:
        for job in list(self.jobs):
            if self._is_cancelled(job):
                self.fail(job, GenerationCancelled("cancelled"))

    # ---------------------------------------------------------------------------------------- a turn

    def _turn(self) -> None:
        """A token of every answer, a piece of the prompts that wait, a view of a picture."""
        if self._may_begin:
            self._begin_waiting()
        answering = [r for r in self._active if isinstance(r, Answering) and r.is_answering]
        if self._pictures:
            self._encode(self._pictures[0], 1 if answering else None)
        prompting = [r for r in self._active if r.n_left]
        if prompting:
            self._mixed_step(answering, prompting)
        elif answering:
            self._steps(answering)
        for request in answering:
            if request.is_unread and request in self._active:
                self._park(request)
        self._counts.free = self.sequences.n_cells - self.sequences.n_used()

    def _begin_waiting(self) -> None:
        self._may_begin = False
        while self._waiting and len(self._active) < self.n_parallel:
            request = self._waiting[0]
            try:
                if not self._has_room(request) or self._is_being_computed(request):
                    return
                self._place(request)
            except BaseException as error:
                self.fail(request, error)

    def _place(self, request: Request[Any]) -> None:
        request.prepare()
        seq, n_held = self.sequences.take(request.script, request.most_reused)
        if request.begun is None:
            self._counts.cached_tokens += n_held
        request.begin(seq, n_held)
        self._waiting.remove(request)
        bisect.insort(self._active, request, key=lambda other: other.number)

    def _has_room(self, request: Request[Any]) -> bool:
        """Whether there are cells for it beside the running ones, their remaining rows and a margin each."""
        n = len(request.script) + sum(other.n_left for other in self._active)
        n += _MARGIN * (len(self._active) + 1)
        return not self._active or self.sequences.fits(n, request.script, reuse=request.reuse)

    def _is_being_computed(self, request: Request[Any]) -> bool:
        """Whether a prompt that is being computed begins with many of its rows: then that one comes first."""
        others = [other for other in self._active if other.n_left and request.reuse]
        shared = max((request.script.shared_with(other.script) for other in others), default=0)
        return shared > _SHARED and shared > self.sequences.shared(request.script) + _SHARED

    # -------------------------------------------------------------------------------------- pictures

    def _encode(self, job: Encode[Any], n: int | None) -> None:
        first = job.n_encoded
        views = job.pixels[first : None if n is None else first + n]
        done = self.embeddings.get(job.content)
        if done is None:
            self._share = (first / len(job.pixels), len(views) / len(job.pixels))
            found = self._call([job], lambda: self.session.encode(views))
            if found is None:
                return
            job.features.append(found)
            if job.n_encoded < len(job.pixels):
                return
            try:
                done = job.merge(_joined(job.features))
            except BaseException as error:
                self.fail(job, error)
                return
            self.embeddings.missed(job.content, done, keep=job.keep)
        else:
            self.embeddings.hit(job.content)
        job.finish(done)
        self._remove(job)

    # ----------------------------------------------------------------------------------------- steps

    def _mixed_step(self, answering: list[Answering], prompting: list[Request[Any]]) -> None:
        beside = max(_PIECE, int(self._rows_per_second * _PIECE_SECONDS))
        pieces = self._pieces(prompting, min(self.n_batch, beside) if answering else self.n_batch)
        n_answers = sum(request.n_next for request in answering)
        n = n_answers + sum(piece.n for _, piece in pieces)
        if not self._make_room(n):
            return
        self._share = self._share_of(*pieces[0])
        parts: list[_Part] = [*((r, None) for r in answering), *pieces]
        started = time.perf_counter()
        found = self._together(parts, pieces[0][0])
        if found:
            self._rows_per_second = (n - n_answers) / (time.perf_counter() - started)
        self._hand_out(found)

    @staticmethod
    def _share_of(request: Request[Any], piece: Piece) -> tuple[float, float]:
        """Where a piece begins in the rows that a request has to compute, and its share of them."""
        n = max(1, len(request.script) - request.n_cached)
        return (request.n_held - request.n_cached) / n, piece.n / n

    def _together(self, parts: list[_Part], oldest: Request[Any]) -> list[_Result]:
        """Computes a step: the next rows of prompts, the last tokens of answers. If it fails, each alone.

        Only cancelling the oldest prompt interrupts it: if others did, the oldest might start over again and
        again.
        """
        requests = [request for request, _ in parts]
        runs = [_run_of(part) for part in parts]
        try:
            found = self._call(requests, lambda: self.session.step(runs), [oldest])
        except BaseException as error:
            return [each for part in parts for each in self._alone(part, error)]
        return [] if found is None else [(r, p, ran) for (r, p), ran in zip(parts, found, strict=True)]

    def _has_moved(self, request: Request[Any], error: BaseException) -> bool:
        """Whether a failed step has computed its rows all the same (memory ran out later): then it fails."""
        if self.session.seq_length(request.seq) <= request.n_rows:
            return False
        self.fail(request, _copy_of(error))
        return True

    def _alone(self, part: _Part, error: BaseException) -> list[_Result]:
        """Computes one part of a failed step by itself.

        The prompt that caused the failure may have lost all its rows: they are computed again here, so that
        it fails alone and not in another step with others.
        """
        request, piece = part
        if self._has_moved(request, error):
            return []
        if piece is None:
            single = self._call([request], lambda: self.session.step([request.next_run()]))
            return [] if single is None else [(request, None, single[0])]
        end = request.n_held + piece.n
        request.n_held = min(request.n_held, self.session.seq_length(request.seq))
        while request.n_held < end and not request.is_done:
            piece = request.script.piece(request.n_held, end - request.n_held)
            found = self._call([request], partial(self.session.step, [request.run(piece)]))
            if found is None:
                break
            if request.n_held + piece.n == end:
                return [(request, piece, found[0])]
            self._feed(request, partial(request.took, piece, found[0]))
        return []

    def _steps(self, answering: list[Answering]) -> None:
        """Computes tokens of all answers, and no prompts: several steps in one call."""
        if not self._make_room(sum(request.n_next for request in answering)):
            return
        if any(request.is_constrained for request in answering):  # what may follow is known step by step
            self._hand_out(self._together([(request, None) for request in answering], answering[0]))
            return
        n_steps = min(request.n_steps for request in answering)
        seconds = _STEPS_SHOWN if any(request.stream for request in answering) else _STEPS
        runs = [request.next_run() for request in answering]
        try:
            found = self._call(answering, lambda: self.session.generate(runs, n_steps, seconds))
        except BaseException as error:
            self._hand_out([each for request in answering for each in self._alone((request, None), error)])
            return
        for request, chosen in zip(answering, found or [], strict=False):
            self._feed(request, partial(request.chose, chosen))

    def _hand_out(self, found: list[_Result]) -> None:
        """Gives the requests of a step their results."""
        for request, piece, ran in found:
            if piece is None:
                self._feed(request, partial(request.went_on, ran))
            else:
                self._counts.prompt_tokens += 0 if piece.answer else piece.n
                self._feed(request, partial(request.took, piece, ran))
                self._may_begin = self._may_begin or request.n_left == 0

    def _feed(self, request: Request[Any], take: Callable[[], None]) -> None:
        """Hands a request its results."""
        n_before = len(request.tokens) if isinstance(request, Answering) else 0
        try:
            take()
        except BaseException as error:
            self.fail(request, error)
            return
        if isinstance(request, Answering):
            self._counts.completion_tokens += len(request.tokens) - n_before
        if request.is_done:
            self._remove(request)

    def _pieces(self, prompting: list[Request[Any]], n_rows: int) -> list[tuple[Request[Any], Piece]]:
        """The next `n_rows` rows of the oldest prompts."""
        found: list[tuple[Request[Any], Piece]] = []
        for request in prompting:
            if n_rows <= 0:
                break
            piece = request.script.piece(request.n_held, n_rows)
            if piece.answer:
                piece = request.script.piece(request.n_held, max(1, n_rows // _ROWS_OF_ANSWER))
            n_rows -= piece.n * (_ROWS_OF_ANSWER if piece.answer else 1)
            found.append((request, piece))
        return found

    # ------------------------------------------------------------------------------------------ room

    def _make_room(self, n: int) -> bool:
        """Frees n cells. If idle sequences have too few, sets the youngest request aside; then False."""
        if self.sequences.make_room(n) or len(self._active) == 1:
            return True
        self._set_aside(self._active[-1])
        return False

    def _set_aside(self, request: Request[Any]) -> None:
        self._active.remove(request)
        self._leave(request)
        if isinstance(request, Answering):
            request.n_set_aside += 1
            request.set_aside()
        request.n_held = 0
        self._counts.set_aside += 1
        self._wait(request)
        self._may_begin = False  # not before the others have progressed

    def _park(self, request: Answering) -> None:
        """Sets an answer aside whose reader is slow: others may have its place."""
        self._active.remove(request)
        self._leave(request)
        request.set_aside()
        self._parked.append(request)
        request.is_parked = True
        self._may_begin = True
        if not request.is_unread:  # the reader has read on meanwhile, before it was parked
            self.unpark(request)

    def unpark(self, request: Request[Any]) -> None:
        """Its reader wants more."""
        request.is_parked = False
        self._parked.remove(request)
        self._wait(request)

    # -------------------------------------------------------------------------------------- the core

    def _call(
        self, jobs: Sequence[Job[Any]], call: Callable[[], T], long: Sequence[Job[Any]] | None = None
    ) -> T | None:
        """Calls C for some jobs. None if the call was interrupted, or failed for a single job.

        Cancelling one of the jobs in `long` (default: the only one) interrupts the call. The others lose one
        step at most, which the next turn repeats.
        """
        self._stop = None
        self.computing = long if long is not None else jobs if len(jobs) == 1 else ()
        try:
            self.session.cancel(False)
            if any(self._is_cancelled(job) for job in jobs):
                return None
            return call()
        except GenerationCancelled:
            if self._stop is not None:
                self.fail((long or jobs)[0], self._stop)
            return None
        except BaseException as error:
            if len(jobs) > 1:
                raise
            self.fail(jobs[0], error)
            return None
        finally:
            self.computing = ()

    def _report(self, stage: str, fraction: float) -> bool:
        """Reports progress of a call of C as its share of the whole."""
        begin, share = self._share
        try:
            wanted = self._tell(stage, min(1.0, begin + fraction * share))
        except BaseException as error:
            self._stop = error
            return False
        if not wanted:
            self._stop = GenerationCancelled("cancelled")
        return wanted


def _run_of(part: _Part) -> _lib.Run:
    request, piece = part
    run: _lib.Run = request.next_run() if piece is None else request.run(piece)
    return run


def _copy_of(error: BaseException) -> BaseException:
    """A copy of an exception, since each thread raises its own."""
    try:
        return copy.copy(error)
    except Exception:
        return PyllavaError(str(error))


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
