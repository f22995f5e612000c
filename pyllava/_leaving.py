"""Long calls in C that Ctrl-C can leave: they run on a thread of their own, and who waits may go."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_SLICE = 0.1  # seconds: on Windows no signal wakes who waits
_one = _thread.allocate_lock()  # of the calls that were left, one at a time takes memory


def _renew() -> None:
    """A forked child has none of the threads."""
    global _one
    _one = _thread.allocate_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def leavable(call: Callable[[], T]) -> T:
    """The result of `call`, which an interrupt leaves to run to its end unseen; its result is then dropped.

    Signals reach the main thread alone, so that on others it is a plain call. What `call` uses must not be touched
    by anybody who could come after an interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    done = _thread.allocate_lock()  # no lock of Python code: an interrupt could leave one taken
    done.acquire()
    left: list[bool] = []
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with _one:
                if not left:
                    found.append(call())
        except BaseException as error:
            failed.append(error)
        finally:
            done.release()

    try:
        _thread.start_new_thread(work, ())
        while not done.acquire(timeout=_SLICE):
            pass
    finally:
        left.append(True)
    if failed:
        raise failed[0]
    return found[0]
