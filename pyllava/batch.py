"""Many pictures through one model: an iterator in, results out (`Llava.batch`).

Threads take the sources one by one, load and cut their pictures, and ask; the engine computes the answers of all threads in
the same steps. There are more threads than answers at once, so that the next pictures are decoded and encoded while the
model writes. A semaphore holds the threads back when results wait to be read: so memory depends on neither the number of
sources nor the speed of the reader.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .answer import Answer, Stream
from .errors import ClosedError, DeviceError, ForkError, GenerationCancelled

T = TypeVar("T")
Running = Callable[[Stream], Answer]
Answers = tuple[Answer, ...]

_ENDING = (ClosedError, DeviceError, ForkError, GenerationCancelled)  # of the model, not of a picture
_SLICE = 0.05  # seconds that the reader waits at a time: a system may hold back signals while a thread waits


@dataclass(frozen=True)
class Result(Generic[T]):
    """What became of one source: answers, or the error that took their place."""

    source: T
    answers: Answers = ()
    """As many as `samples` asked for."""
    error: Exception | None = None

    @property
    def answer(self) -> Answer | None:
        """The first of the answers."""
        return self.answers[0] if self.answers else None


@dataclass(frozen=True)
class _Stopped:
    """What ended the batch: the sources' own exception, or one of the model."""

    error: BaseException


class _Batch(Generic[T]):
    """Threads over sources. `ask` answers one of them; it has the answer computed by the function it is given."""

    def __init__(
        self, ask: Callable[[T, Running], Answers], sources: Iterable[T], n_threads: int, n_ahead: int
    ) -> None:
        self._ask = ask
        self._sources = enumerate(sources)
        self._taking = threading.Lock()
        self._room = threading.Semaphore(n_ahead)
        self._done: queue.SimpleQueue[tuple[int, Result[T]] | _Stopped | None] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._is_closed = False
        self._n_threads = self._n_running = n_threads
        for _ in range(n_threads):
            run = contextvars.copy_context().run  # the reader's epoch is the threads', too
            threading.Thread(target=run, args=(self._work,), name="pyllava-batch", daemon=True).start()

    # ------------------------------------------------------------------------------------------ threads

    def _work(self) -> None:
        try:
            while (taken := self._next_source()) is not None:
                number, source = taken
                self._done.put((number, self._result(source)))
        except BaseException as error:
            self._is_closed = True
            self._done.put(_Stopped(error))
        self._done.put(None)

    def _next_source(self) -> tuple[int, T] | None:
        self._room.acquire()
        with self._taking:
            taken = None if self._is_closed else next(self._sources, None)
        if taken is None:
            self._room.release()  # for the next thread, which will find the end, too
        return taken

    def _result(self, source: T) -> Result[T]:
        try:
            return Result(source, self._ask(source, self._whole))
        except _ENDING:
            raise
        except Exception as error:
            return Result(source, error=error.with_traceback(None))  # whose frames hold the picture

    def _whole(self, stream: Stream) -> Answer:
        self._streams.add(stream)
        try:
            if self._is_closed:
                raise GenerationCancelled("cancelled")
            return stream.whole()
        finally:
            self._streams.discard(stream)

    # ------------------------------------------------------------------------------------------ reader

    def results(self) -> Generator[tuple[int, Result[T]], None, None]:
        """Numbers of sources and results, as they come."""
        while self._n_running:
            try:
                done = self._done.get(timeout=_SLICE)
            except queue.Empty:
                continue
            if done is None:
                self._n_running -= 1
            elif isinstance(done, _Stopped):
                raise done.error
            else:
                yield done

    def took(self) -> None:
        """The reader has taken a result: there is room for another one."""
        self._room.release()

    def close(self) -> None:
        """Gives up what is under way."""
        self._is_closed = True
        for stream in list(self._streams):
            stream.close()
        for _ in range(self._n_threads):
            self._room.release()


def results(
    ask: Callable[[T, Running], Answers],
    sources: Iterable[T],
    *,
    n_threads: int,
    n_ahead: int,
    in_order: bool,
) -> Generator[Result[T], None, None]:
    """Results of all sources; at most `n_ahead` are under way or wait to be read. Ending the generator ends the threads."""
    batch = _Batch(ask, sources, n_threads, n_ahead)
    held: dict[int, Result[T]] = {}
    n_read = 0
    try:
        for number, result in batch.results():
            held[n_read if not in_order else number] = result
            while n_read in held:
                yield held.pop(n_read)
                batch.took()
                n_read += 1
    finally:
        batch.close()
