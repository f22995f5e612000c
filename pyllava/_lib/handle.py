"""Ownership and lifetime of C objects, and the callbacks that C is given."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import errors
from .._plain import plain
from .functions import _LOG_FN, _PROGRESS_FN
from .load import lib
from .values import is_false

if TYPE_CHECKING:
    from .session import SessionHandle

Progress: TypeAlias = Callable[[str, float], object]
Log: TypeAlias = Callable[[int, str], None]


class _Object:
    """A C object of this process: freed when nobody refers to it, and before the object it was made from."""

    def __init__(self, free: str, address: int, parent: _Object | None) -> None:
        self.address, self.pid = address, os.getpid()
        self._finalizer = weakref.finalize(self, _free, free, address, self.pid, parent)
        self._finalizer.atexit = False


class _Use:
    """Keeps an object alive during a call by a reference, which no interrupt between byte codes loses."""

    __slots__ = ("_object",)

    def __init__(self, held: _Object) -> None:
        self._object: _Object | None = held

    def __enter__(self) -> int:
        assert self._object is not None
        return self._object.address

    def __exit__(self, *exception: object) -> None:
        self._object = None  # a traceback may outlive the call


class _Handle:
    """Owns one C object. It is freed by close(), or when nobody refers to it, but never while a call uses it.

    `parent` is the handle of an object that must outlive it. At the interpreter's end nothing is freed: the
    operating system takes the memory back.
    """

    def __init__(self, free: str, address: int | None, parent: _Handle | None = None) -> None:
        assert address
        self._pid = os.getpid()
        self._object: _Object | None = _Object(free, address, None if parent is None else parent.object())
        self._watch = weakref.ref(self._object)

    def object(self) -> _Object:
        """The object, alive while it is referred to. Raises ClosedError, or ForkError in a forked child."""
        if self.foreign:
            raise errors.ForkError(
                'the model was loaded before fork(): load it in the child, or start with "spawn"'
            )
        found = self._object
        if found is None or _exiting.is_set():
            raise errors.ClosedError("the model was closed")
        return found

    def use(self) -> _Use:
        """For ``with``: the object's address for a call. Raises ClosedError, ForkError in a forked child."""
        return _Use(self.object())

    @property
    def busy(self) -> bool:
        """True while a call of this process uses it: somebody but this handle refers to the object."""
        held = self._watch()
        own = 1 if self._object is not None else 0
        return held is not None and not self.foreign and sys.getrefcount(held) > own + 2

    @property
    def foreign(self) -> bool:
        """True in a forked child."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Frees the object, or has the call that uses it free it at its end; a second call does nothing."""
        if not self.foreign:
            self._object = None


_exiting = threading.Event()
_sessions: weakref.WeakSet[SessionHandle] = weakref.WeakSet()


@atexit.register
def _end_running_calls() -> None:
    """Ends running calls at exit: daemon threads must not compute while the library is torn down."""
    _exiting.set()
    busy = [session for session in _sessions if session.handle.busy]
    for session in busy:
        session.cancel_at_exit()
    deadline = time.monotonic() + 10
    while any(session.handle.busy for session in busy) and time.monotonic() < deadline:
        time.sleep(0.005)


def _free(name: str, address: int, pid: int, parent: _Object | None) -> None:
    del parent  # it may be freed once this object is
    if os.getpid() == pid:  # a forked child does not own the threads behind it
        getattr(lib, name)(address)


class _Callback:
    """A Python callable as a C callback that never lets an exception through: it is kept and raised later."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def progress(self, fn: Progress | None) -> Any:
        if fn is None:
            return _PROGRESS_FN()

        def call(stage: bytes, fraction: float, _user: object) -> bool:
            try:
                return not is_false(fn(stage.decode(), fraction))
            except BaseException as error:
                self.error = error
                return False

        return _PROGRESS_FN(call)

    def log(self, fn: Log | None) -> Any:
        if fn is None:
            return _LOG_FN()

        def call(level: int, text: bytes, _user: object) -> None:
            try:
                fn(level, "\n".join(map(plain, text.decode(errors="replace").split("\n"))))
            except BaseException as error:
                self.error = error

        return _LOG_FN(call)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error
