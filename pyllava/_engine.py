"""The engine: one thread that owns a model's session and its sequences. Callers are its clients.

What is computed next is decided by `_scheduler`. A client puts a job into a queue and waits for the job's events; it takes
no lock. So an interrupt, which Python raises in the main thread between any two byte codes, leaves nothing half done:
it ends the client's call, whose exception handler cancels the job; if the handler is interrupted, too, the end of the
call's frame does.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import contextvars
import os
import queue
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar, cast

from . import _lib
from ._lib.values import is_false
from ._request import Answering, Call, Encode, Ended, Epoch, Job, Request
from ._scheduler import Scheduler, Stats
from ._sequences import Sequences
from .errors import ClosedError, ForkError, GenerationCancelled, PyllavaError

T = TypeVar("T")
Progress = Callable[[str, float], object]

_SLICE = 0.05  # seconds that a client waits at a time


own_epoch: contextvars.ContextVar[Epoch | None] = contextvars.ContextVar("own_epoch", default=None)
"""Of calls that can be ended without those of others; None: the engine's."""


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
        self._epoch = Epoch()  # jobs of one that is over are cancelled
        self._closing = False
        self.has_ended = False
        self._progress = progress

        self._scheduler: Scheduler | None = None  # once there is a session
        self._n_jobs = 0
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
            raise _closed()

    def epoch(self) -> Epoch:
        """The current epoch, for a call that begins: cancel_all() ends the jobs of this epoch."""
        self.check()
        return own_epoch.get() or self._epoch

    def run(self, job: Job[T], epoch: Epoch | None = None) -> T:
        """Runs a job and returns its result. Any exception in the client's thread cancels it."""
        pieces = self.pieces(job, epoch or self.epoch())
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return cast(T, end.value)

    def pieces(self, job: Job[T], epoch: Epoch) -> Generator[str, None, T]:
        """Yields the texts of a streaming job, then returns its result.

        If the job has a `notify`, nothing waits here: where there is no text yet, it yields "".
        """
        client = _Client()
        try:
            self._submit(job, client, epoch)
            while True:
                if job.notify is not None and job.events.empty():
                    self._check(job)
                    yield ""
                    continue
                event = self._next(job)
                if isinstance(event, Ended):
                    job.watch = None
                    return cast(T, event.result)
                self._took(job)
                yield cast(str, event)
        except BaseException:
            self.cancel(job)
            raise

    def run_all(self, jobs: Sequence[Job[T]], epoch: Epoch) -> list[T]:
        """Runs jobs that have no pieces of text, as many at once as the engine does, and returns their results."""
        client = _Client()
        try:
            for job in jobs:
                self._submit(job, client, epoch)
            found = []
            for job in jobs:
                event = self._next(job)
                assert isinstance(event, Ended)
                job.watch = None
                found.append(cast(T, event.result))
            return found
        except BaseException:
            for job in jobs:
                self.cancel(job)
            raise

    def _submit(self, job: Job[Any], client: _Client, epoch: Epoch) -> None:
        job.epoch, job.submitted = epoch, time.perf_counter()
        job.watch = weakref.ref(client, self._inbox.put)
        self._inbox.put(job)

    def _check(self, job: Job[Any]) -> None:
        """Raises where nobody will compute the job any more."""
        self.check()
        if job.epoch.is_over:
            raise GenerationCancelled("cancelled")

    def _next(self, job: Job[Any]) -> object:
        """Waits for the next event in slices: a system may hold back signals while a thread waits."""
        while True:
            self._check(job)
            try:
                event = job.events.get(timeout=_SLICE)
            except queue.Empty:
                continue
            if not isinstance(event, BaseException):
                return event
            if isinstance(event, GenerationCancelled) and self._closing:
                event = _closed()
            try:
                raise event
            finally:
                del event  # whose traceback refers to this frame, and so to all of the caller's

    def _took(self, job: Job[Any]) -> None:
        if isinstance(job, Answering):
            job.n_taken += 1
            if job.is_parked and job.needs_text:
                self._inbox.put(job)

    @property
    def keeps_embeddings(self) -> bool:
        """Whether there are any that `known` could find."""
        return bool(self._scheduler and self._scheduler.embeddings)

    def known(self, content: bytes) -> Any:
        """The embedding of a picture that was encoded already, or None."""
        found = self._scheduler.embeddings.get(content) if self._scheduler else None
        if found is not None:
            self._inbox.put(content)
        return found

    def cancel(self, job: Job[Any]) -> None:
        """Ends one job that nobody waits for any more."""
        job.is_cancelled = True
        if not job.is_done and os.getpid() == self._pid:
            if self._scheduler and job in self._scheduler.computing:
                self._interrupt()
            self._inbox.put(None)

    def cancel_all(self) -> None:
        """Ends all jobs begun so far with GenerationCancelled."""
        ended, self._epoch = self._epoch, Epoch()
        ended.end()
        self._interrupt()
        self._inbox.put(None)

    def end(self, epoch: Epoch) -> None:
        """Ends the jobs of an epoch with GenerationCancelled."""
        epoch.end()
        if self._scheduler and any(job.epoch is epoch for job in self._scheduler.computing):
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
        assert self._scheduler
        return self._scheduler.stats()

    def load(self, load: Callable[[Progress], _lib.ModelHandle]) -> None:
        """Loads the model; load() is given the progress callback."""

        def progress(stage: str, fraction: float) -> bool:
            return self.tell(stage, fraction) and not (job.is_cancelled or self._closing)

        def call() -> None:
            self.model = load(progress)

        job = Call(call)
        self.run(job)

    def open(
        self,
        session: _lib.SessionHandle,
        n_parallel: int,
        sequences: Sequences,
        n_batch: int,
        cache_bytes: int,
    ) -> None:
        """Sets the session and its sequences, in the engine's thread. `cache_bytes`: of pictures' embeddings, at most."""
        self.session = session
        self._scheduler = Scheduler(
            session, sequences, n_parallel, n_batch, cache_bytes, self._is_cancelled, self.tell
        )

    # ------------------------------------------------------------------------------------------ the thread

    def _main(self) -> None:
        self._thread = _thread.get_ident()
        try:
            while not self._closing:
                self._hear()
                if self._scheduler and not self._closing:
                    self._scheduler.turn()
        finally:
            self._end()

    def _end(self) -> None:
        if self._scheduler:
            self._scheduler.end(_closed)
        self._thread = -1  # another thread may get its number
        for name in ("session", "model"):
            with contextlib.suppress(AttributeError):
                getattr(self, name).close()
        self.has_ended = True
        with contextlib.suppress(queue.Empty):
            while True:  # those that came too late
                item = self._inbox.get_nowait()
                if isinstance(item, Job) and not item.is_done:
                    item.fail(_closed())

    def _hear(self) -> None:
        """Handles what is in the inbox; waits for it if there is nothing else to do."""
        is_idle = not (self._scheduler and self._scheduler.has_work)
        with contextlib.suppress(queue.Empty):
            self._take(self._inbox.get(block=is_idle))
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, item: object) -> None:
        try:
            if item is self._owner:
                self._closing = True
            elif isinstance(item, Call):
                self._make(item)
            elif self._scheduler:
                self._understand(item, self._scheduler)
        except BaseException as error:
            if isinstance(item, Job):
                item.fail(error)

    def _understand(self, item: object, scheduler: Scheduler) -> None:
        if isinstance(item, weakref.ref):
            for job in scheduler.jobs:
                job.is_cancelled = job.is_cancelled or job.watch is item
        elif isinstance(item, bytes):
            scheduler.embeddings.hit(item)
        elif isinstance(item, Request) and item.is_parked:
            scheduler.unpark(item)
        elif isinstance(item, Encode | Request) and item.number < 0:
            item.number = self._n_jobs
            self._n_jobs += 1
            scheduler.add(item)

    def _make(self, call: Call[Any]) -> None:
        if self._is_cancelled(call):
            call.fail(GenerationCancelled("cancelled"))
        else:
            call.finish(call.function())

    def _is_cancelled(self, job: Job[Any]) -> bool:
        return job.is_cancelled or job.epoch.is_over or self._closing

    def tell(self, stage: str, fraction: float) -> bool:
        """Calls the owner's progress callback; False: the work is to end."""
        owner = self._owner()
        progress = None if owner is None else self._progress(owner)
        return progress is None or not is_false(progress(stage, fraction))


def _closed() -> ClosedError:
    return ClosedError("the model was closed")


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _end_engines() -> None:
    """Ends all engines at exit: no thread may compute while the library is torn down."""
    for engine in list(_engines):
        engine.close(10.0)
