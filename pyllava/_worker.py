"""Long C calls that Ctrl-C can end.

Python runs signal handlers only when the main thread is back in the interpreter, so a long call runs in a worker thread
while the main thread waits in slices of 50 ms. On KeyboardInterrupt, or whatever else a signal handler raises, the call is
cancelled and waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
_SLICE = 0.05  # seconds


class Worker:
    """One thread, started when first used from the main thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[], T], cancel: Callable[[bool], None]) -> T:
        """`call()`, in the worker if this is the main thread.

        `cancel(True)` must make the call end, `cancel(False)` forget that.
        """
        if threading.current_thread() is not threading.main_thread():
            return call()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        future: Future[T] | None = None
        try:
            future = self._pool.submit(call)
            while not future.done():
                wait([future], _SLICE)
        except BaseException:
            _settle(future, cancel)
            raise
        return future.result()

    def close(self) -> None:
        """Ends the thread once it has nothing to do."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


def _settle(future: Future[T] | None, cancel: Callable[[bool], None]) -> None:
    """Cancels the call and waits for its end, through further interrupts: they ask for what is under way already."""
    while future is not None and not future.done():
        try:
            cancel(True)
            wait([future], _SLICE)
        except BaseException:
            continue
    cancel(False)
