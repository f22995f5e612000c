"""Locks of the system on open files and folders: they end with the process that has them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator

_log = logging.getLogger("pyllava")


def lock(fd: int, name: str) -> None:
    """Locks what is open as `fd` for this process. Raises ValueError where another one has it.

    Some file systems have no locks, and Windows none of this kind: then there is a warning, or nothing.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{name}: another run is writing it: wait for it, or name another output") from None
    except OSError as error:
        _log.warning("%s: no lock (%s): see to it that no other run writes it", name, error.strerror)


@contextlib.contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """A folder is locked while this lasts."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield
        return
    try:
        lock(fd, folder)
        yield
    finally:
        os.close(fd)
