"""The engine: one thread that owns a model's session and its sequences. Callers are its clients.

Each turn computes a token of every running answer, and a piece of the prompts that have arrived. A client
puts a job into a queue and waits for the job's events; it takes no lock. So an interrupt, which Python raises
in the main thread between any two byte codes, leaves nothing half done: it ends the client's call, whose
exception handler cancels the job; if the handler is interrupted, too, the end of the call's frame does.
"""

from __future__ import annotations

import _thread
import atexit
import bisect
import contextlib
import copy
import logging
import os
import queue
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from . import _lib
from ._request import Answering, Call, Encode, Ended, Job, Request
from ._script import Piece
from ._sequences import Sequences
from .errors import ClosedError, ForkError, GenerationCancelled, PyllavaError

T = TypeVar("T")
Progress = Callable[[str, float], object]

_log = logging.getLogger("pyllava")
_SLICE = 0.05  # seconds that a client waits at a time
_PIECE = 128  # rows of prompts in a step beside answers; more if they take _PIECE_SECONDS at most
_PIECE_SECONDS = 0.05
_ROWS_OF_ANSWER = 8  # one row of an answer costs as much as so many of a prompt
_STEPS, _STEPS_SHOWN = 0.03, 0.01  # seconds of steps in one call of C; if a stream is read
_MARGIN = 32  # free cells that each answer needs before another one is begun
_SHARED = 64  # common rows for which a prompt waits for another one
_CACHED_EMBEDDINGS = 256 << 20  # bytes of image embeddings kept


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


@dataclass
class _Counts:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    set_aside: int = 0
    free: int = 0


_Part: TypeAlias = tuple[Any, Piece | None]
"""A request in a step: the next rows of its script, or None: the last token of its answer."""


class _Client:
    """Lives as long as the frame of a call; the call's job is cancelled when it is freed."""

    __slots__ = ("__weakref__",)


class Engine:
    """Runs jobs, in a thread of its own, until close(), or until `owner` is gone.

    `progress` returns the owner's callback. It is called for each report: the callback may refer to the
    owner.
    """

    model: _lib.ModelHandle
    session: _lib.SessionHandle

    def __init__(self, owner: object, progress: Callable[[Any], Progress | None]) -> None:
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._owner = weakref.ref(owner, self._inbox.put)
        self._pid = os.getpid()
        self._epoch = object()  # jobs of an earlier one are cancelled
        self._closing = False
        self.has_ended = False
        self.embeddings: OrderedDict[bytes, Any] = OrderedDict()  # of pictures, by their content
        self._progress = progress

        self._waiting: list[Request[Any]] = []  # in order of arrival, as the other lists
        self._active: list[Request[Any]] = []
        self._parked: list[Request[Any]] = []
        self._pictures: list[Encode[Any]] = []
        self._jobs: list[Job[Any]] = []  # all of them, wherever they are
        self._n_jobs = 0
        self._may_begin = False  # something has changed for waiting requests
        self._computing: Sequence[Job[Any]] = ()  # cancelling one of them interrupts C
        self._rows_per_second = 0.0  # of prompts, in the last step that had any
        self._share = (0.0, 1.0)  # of the reported progress: where it begins, how much it is
        self._stop: BaseException | None = None  # what the progress callback has raised, or its refusal
        self._counts = _Counts()
        self._sequences: Sequences | None = None
        self._thread = -1
        try:
            _thread.start_new_thread(self._main, ())
        except BaseException:
            self.has_ended = True
            raise
        _engines.add(self)

    # ------------------------------------------------------------------------------------------ clients

    def check(self) -> None:
        """Raises as a client's call would: ClosedError, ForkError, or PyllavaError in a callback."""
        if os.getpid() != self._pid:
            raise ForkError('the model was loaded before fork(): load it in the child, or start with "spawn"')
        if _thread.get_ident() == self._thread:
            raise PyllavaError("the model was called from its own progress callback")
        if self._closing or self.has_ended:
            raise ClosedError("the model was closed")

    def epoch(self) -> object:
        """The current epoch, for a call that begins: cancel_all() ends the jobs of this epoch."""
        self.check()
        return self._epoch

    def run(self, job: Job[T], epoch: object = None) -> T:
        """Runs a job and returns its result. Any exception in the client's thread cancels it."""
        pieces = self.pieces(job, epoch or self.epoch())
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return cast(T, end.value)

    def pieces(self, job: Job[T], epoch: object) -> Generator[str, None, T]:
        """Yields the texts of a streaming job, then returns its result."""
        client = _Client()
        try:
            job.epoch, job.submitted = epoch, time.perf_counter()
            job.watch = weakref.ref(client, self._inbox.put)
            self._inbox.put(job)
            while True:
                event = self._next(job)
                if isinstance(event, Ended):
                    job.watch = None
                    return cast(T, event.result)
                self._took(job)
                yield cast(str, event)
        except BaseException:
            self.cancel(job)
            raise

    def _next(self, job: Job[Any]) -> object:
        """Waits for the next event in slices: a system may hold back signals while a thread waits."""
        while True:
            self.check()
            if job.epoch is not self._epoch:
                raise GenerationCancelled("cancelled")
            try:
                event = job.events.get(timeout=_SLICE)
            except queue.Empty:
                continue
            if not isinstance(event, BaseException):
                return event
            try:
                raise event
            finally:
                del event  # whose traceback refers to this frame, and so to all of the caller's

    def _took(self, job: Job[Any]) -> None:
        if isinstance(job, Answering):
            job.n_taken += 1
            if job.is_parked and job.needs_text:
                self._inbox.put(job)

    def known(self, content: bytes) -> Any:
        """The embedding of a picture that was encoded already, or None."""
        found = self.embeddings.get(content)
        if found is not None:
            self._inbox.put(content)
        return found

    def cancel(self, job: Job[Any]) -> None:
        """Ends one job that nobody waits for any more."""
        job.is_cancelled = True
        if not job.is_done and os.getpid() == self._pid:
            if job in self._computing:
                self._interrupt()
            self._inbox.put(None)

    def cancel_all(self) -> None:
        """Ends all jobs begun so far with GenerationCancelled."""
        self._epoch = object()
        self._interrupt()
        self._inbox.put(None)

    def _interrupt(self) -> None:
        session = getattr(self, "session", None)
        if session is not None:
            session.cancel()

    def close(self, seconds: float = float("inf")) -> None:
        """Ends all jobs with ClosedError and frees the model; waits for it, except in the engine's thread."""
        if os.getpid() != self._pid:
            return  # a forked child does not own it
        self._closing = True
        self._interrupt()
        self._inbox.put(None)
        end, pause = time.monotonic() + seconds, 0.0002
        while _thread.get_ident() != self._thread and not self.has_ended and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def stats(self) -> Stats:
        """Numbers that may be a turn old."""
        counts, sequences = self._counts, self._sequences
        n_cells = sequences.n_cells if sequences else 0
        return Stats(
            waiting=len(self._waiting) + len(self._parked),
            running=len(self._active),
            kv_cells=n_cells,
            kv_cells_used=n_cells - counts.free,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            completion_tokens=counts.completion_tokens,
            set_aside=counts.set_aside,
        )

    def load(self, load: Callable[[Progress], _lib.ModelHandle]) -> None:
        """Loads the model; load() is given the progress callback."""

        def progress(stage: str, fraction: float) -> bool:
            return self.tell(stage, fraction) and not (job.is_cancelled or self._closing)

        def call() -> None:
            self.model = load(progress)

        job = Call(call)
        self.run(job)

    def open(
        self, session: _lib.SessionHandle, n_parallel: int, n_seq: int, n_batch: int, n_cells: int
    ) -> None:
        """Sets the session and its sequences, in the engine's thread."""
        self.n_parallel, self.n_batch = n_parallel, n_batch
        self._sequences = Sequences(session, n_seq, n_cells)
        self._counts.free = n_cells
        session.set_progress(self._report)
        self.session = session

    # ------------------------------------------------------------------------------------------ the thread

    def _main(self) -> None:
        self._thread = _thread.get_ident()
        try:
            while not self._closing:
                self._hear()
                self._guarded(self._drop_cancelled)
                if not self._closing:
                    self._guarded(self._turn)
        finally:
            self._end()

    def _guarded(self, turn: Callable[[], None]) -> None:
        """Runs a turn. If it fails itself, e.g. for lack of memory, the running jobs end and nothing else."""
        try:
            turn()
        except BaseException as error:
            at_rest = [*self._waiting, *self._parked]
            self._active, self._pictures = [], []
            for job in [job for job in self._jobs if job not in at_rest]:
                job.fail(_copy_of(error))
                self._jobs.remove(job)
            if self._sequences:
                self._sequences.leave_all()
            self._may_begin = True

    def _end(self) -> None:
        for job in self._jobs:
            job.fail(ClosedError("the model was closed"))
        self._jobs, self._waiting, self._active, self._parked, self._pictures = [], [], [], [], []
        self._thread = -1  # another thread may get its number
        for name in ("session", "model"):
            with contextlib.suppress(AttributeError):
                getattr(self, name).close()
        self.embeddings = OrderedDict()
        self.has_ended = True
        with contextlib.suppress(queue.Empty):
            while True:  # those that came too late
                item = self._inbox.get_nowait()
                if isinstance(item, Job) and not item.is_done:
                    item.fail(ClosedError("the model was closed"))

    def _hear(self) -> None:
        """Handles what is in the inbox; waits for it if there is nothing else to do."""
        has_work = bool(self._pictures or self._active or self._waiting)
        with contextlib.suppress(queue.Empty):
            self._take(self._inbox.get(block=not has_work))
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, item: object) -> None:
        try:
            self._understand(item)
        except BaseException as error:
            if isinstance(item, Job):
                self._fail(item, error)

    def _understand(self, item: object) -> None:
        if item is self._owner:
            self._closing = True
        elif isinstance(item, weakref.ref):
            for job in self._jobs:
                job.is_cancelled = job.is_cancelled or job.watch is item
        elif isinstance(item, bytes):  # a picture that was seen again
            with contextlib.suppress(KeyError):
                self.embeddings.move_to_end(item)
        elif isinstance(item, Request) and item.is_parked:
            self._unpark(item)
        elif isinstance(item, Job) and item.number < 0:
            self._begin(item)

    def _begin(self, job: Job[Any]) -> None:
        job.number = self._n_jobs
        self._n_jobs += 1
        if self._is_cancelled(job):
            job.fail(GenerationCancelled("cancelled"))
        elif isinstance(job, Call):
            self._make_call(job)
        else:
            self._jobs.append(job)
            if isinstance(job, Encode):
                self._pictures.append(job)
            elif isinstance(job, Request):
                self._wait(job)

    @staticmethod
    def _make_call(job: Call[Any]) -> None:
        try:
            result = job.function()
        except BaseException as error:
            job.fail(error)
        else:
            job.finish(result)

    def _wait(self, request: Request[Any]) -> None:
        bisect.insort(self._waiting, request, key=lambda other: other.number)
        self._may_begin = True

    def _is_cancelled(self, job: Job[Any]) -> bool:
        return job.is_cancelled or job.epoch is not self._epoch

    def _drop_cancelled(self) -> None:
        for job in list(self._jobs):
            if self._is_cancelled(job):
                self._fail(job, GenerationCancelled("cancelled"))

    def _fail(self, job: Job[Any], error: BaseException) -> None:
        job.fail(error)
        self._remove(job)

    def _remove(self, job: Job[Any]) -> None:
        """Removes a finished job; its sequence keeps its rows for others."""
        for jobs in (self._jobs, self._pictures, self._active, self._waiting, self._parked):
            if job in jobs:
                cast("list[Any]", jobs).remove(job)
        if isinstance(job, Request):
            job.is_parked = False
            if job.seq >= 0:
                self._leave(job)
        self._may_begin = True

    def _leave(self, request: Request[Any]) -> None:
        assert self._sequences
        n = request.n_kept if isinstance(request, Answering) else None
        self._sequences.leave(request.seq, n)
        request.seq = -1

    # ------------------------------------------------------------------------------------------ a turn

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
        if self._sequences:
            self._counts.free = self._sequences.n_cells - self._sequences.n_used()

    def _begin_waiting(self) -> None:
        self._may_begin = False
        while self._waiting and len(self._active) < self.n_parallel:
            request = self._waiting[0]
            try:
                if not self._has_room(request) or self._is_being_computed(request):
                    return
                self._place(request)
            except BaseException as error:
                self._fail(request, error)

    def _place(self, request: Request[Any]) -> None:
        assert self._sequences
        request.prepare()
        seq, n_held = self._sequences.take(request.script, request.most_reused)
        if request.begun is None:
            self._counts.cached_tokens += n_held
        request.begin(seq, n_held)
        self._waiting.remove(request)
        bisect.insort(self._active, request, key=lambda other: other.number)

    def _has_room(self, request: Request[Any]) -> bool:
        """Whether there are cells for it beside the running ones, their remaining rows and a margin each."""
        assert self._sequences
        n = len(request.script) + sum(other.n_left for other in self._active)
        n += _MARGIN * (len(self._active) + 1)
        return not self._active or self._sequences.fits(n, request.script, reuse=request.reuse)

    def _is_being_computed(self, request: Request[Any]) -> bool:
        """Whether a prompt that is being computed begins with many of its rows: then that one comes first."""
        assert self._sequences
        others = [other for other in self._active if other.n_left and request.reuse]
        shared = max((request.script.shared_with(other.script) for other in others), default=0)
        return shared > _SHARED and shared > self._sequences.shared(request.script) + _SHARED

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
                self._fail(job, error)
                return
            self._keep(job.content, done)
        job.finish(done)
        self._remove(job)

    def _keep(self, content: bytes, embedding: Any) -> None:
        self.embeddings[content] = embedding
        n_bytes = sum(e.array.nbytes for e in self.embeddings.values())
        while len(self.embeddings) > 1 and n_bytes > _CACHED_EMBEDDINGS:
            n_bytes -= self.embeddings.popitem(last=False)[1].array.nbytes

    def _mixed_step(self, answering: list[Answering], prompting: list[Request[Any]]) -> None:
        beside = max(_PIECE, int(self._rows_per_second * _PIECE_SECONDS))
        pieces = self._pieces(prompting, min(self.n_batch, beside) if answering else self.n_batch)
        n = len(answering) + sum(piece.n for _, piece in pieces)
        if not self._make_room(n):
            return
        self._share = self._share_of(*pieces[0])
        parts: list[_Part] = [*((r, None) for r in answering), *pieces]
        started = time.perf_counter()
        found = self._together(parts, pieces[0][0])
        if found:
            self._rows_per_second = (n - len(answering)) / (time.perf_counter() - started)
        for request, piece, ran in found:
            if piece is None:
                self._feed(request, partial(request.chose, [ran.choice]))
            else:
                self._counts.prompt_tokens += 0 if piece.answer else piece.n
                self._feed(request, partial(request.took, piece, ran))
                self._may_begin = self._may_begin or request.n_left == 0

    @staticmethod
    def _share_of(request: Request[Any], piece: Piece) -> tuple[float, float]:
        """Where a piece begins in the rows that a request has to compute, and its share of them."""
        n = max(1, len(request.script) - request.n_cached)
        return (request.n_held - request.n_cached) / n, piece.n / n

    def _together(self, parts: list[_Part], oldest: Request[Any]) -> list[tuple[Any, Piece | None, _lib.Ran]]:
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
        self._fail(request, _copy_of(error))
        return True

    def _alone(self, part: _Part, error: BaseException) -> list[tuple[Any, Piece | None, _lib.Ran]]:
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

    def _feed(self, request: Request[Any], take: Callable[[], None]) -> None:
        """Hands a request its results."""
        n_before = len(request.tokens) if isinstance(request, Answering) else 0
        try:
            take()
        except BaseException as error:
            self._fail(request, error)
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

    def _make_room(self, n: int) -> bool:
        """Frees n cells. If idle sequences have too few, sets the youngest request aside; then False."""
        assert self._sequences
        if self._sequences.make_room(n) or len(self._active) == 1:
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
            self._unpark(request)

    def _unpark(self, request: Request[Any]) -> None:
        request.is_parked = False
        self._parked.remove(request)
        self._wait(request)

    def _steps(self, answering: list[Answering]) -> None:
        """Computes tokens of all answers, and no prompts: several steps in one call."""
        if not self._make_room(len(answering)):
            return
        n_steps = min(request.n_steps for request in answering)
        seconds = _STEPS_SHOWN if any(request.stream for request in answering) else _STEPS
        runs = [request.next_run() for request in answering]
        try:
            found = self._call(answering, lambda: self.session.generate(runs, n_steps, seconds))
        except BaseException as error:
            for request, run in zip(answering, runs, strict=True):
                if not self._has_moved(request, error):
                    self._step_alone(request, run)
            return
        for request, chosen in zip(answering, found or [], strict=False):
            self._feed(request, partial(request.chose, chosen))

    def _step_alone(self, request: Answering, run: _lib.Run) -> None:
        found = self._call([request], lambda: self.session.generate([run], 1))
        if found is not None:
            self._feed(request, partial(request.chose, found[0]))

    def _call(
        self, jobs: Sequence[Job[Any]], call: Callable[[], T], long: Sequence[Job[Any]] | None = None
    ) -> T | None:
        """Calls C for some jobs. None if the call was interrupted, or failed for a single job.

        Cancelling one of the jobs in `long` (default: the only one) interrupts the call. The others lose one
        step at most, which the next turn repeats.
        """
        self._stop = None
        self._computing = long if long is not None else jobs if len(jobs) == 1 else ()
        try:
            self.session.cancel(False)
            if self._closing or any(self._is_cancelled(job) for job in jobs):
                return None
            return call()
        except GenerationCancelled:
            if self._stop is not None:
                self._fail((long or jobs)[0], self._stop)
            return None
        except BaseException as error:
            if len(jobs) > 1:
                raise
            self._fail(jobs[0], error)
            return None
        finally:
            self._computing = ()

    def _report(self, stage: str, fraction: float) -> bool:
        """Reports progress of a call of C as its share of the whole."""
        begin, share = self._share
        try:
            wanted = self.tell(stage, min(1.0, begin + fraction * share))
        except BaseException as error:
            self._stop = error
            return False
        if not wanted:
            self._stop = GenerationCancelled("cancelled")
        return wanted

    def tell(self, stage: str, fraction: float) -> bool:
        """Calls the owner's progress callback; False: the work is to end."""
        owner = self._owner()
        progress = None if owner is None else self._progress(owner)
        return progress is None or progress(stage, fraction) is not False


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


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _end_engines() -> None:
    """Ends all engines at exit: no thread may compute while the library is torn down."""
    for engine in list(_engines):
        engine.close(10.0)
