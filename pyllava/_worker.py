"""Long C calls that Ctrl-C can end.

Python runs signal handlers only when the main thread is back in the interpreter, so a long call runs in a worker thread
while the main thread waits in slices of 50 ms. On KeyboardInterrupt the call is cancelled and waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

T = TypeVar("T")
_SLICE = 0.05  # seconds


class Worker:
    """One thread, started when first used from the main thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[], T], cancel: Callable[[bool], None]) -> T:
        """`call()`, in the worker if this is the main thread; `cancel(True)` must make it end, `cancel(False)` forget it."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        future = self._pool.submit(call)
        try:
            return _wait(future)
        except KeyboardInterrupt:
            cancel(True)
            future.exception()  # until the call has ended
            cancel(False)
            raise

    def close(self) -> None:
        """Ends the thread; a call from this very thread (a callback) does not wait for it."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


def _wait(future: Future[T]) -> T:
    while True:
        try:
            return future.result(_SLICE)
        except FutureTimeout:
            if future.done():  # the call itself raised TimeoutError
                raise
