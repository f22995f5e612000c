"""The ledger: a JSON Lines file with a row for each picture, which says what is done. See the package's page."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .._part_file import replacing
from .lock import lock
from .tables import Row, line_of

_SYNC_SECONDS = 5.0  # rows of the last seconds may be lost if the machine loses power


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a row."""

    is_ok: bool
    settings: str
    stamp: tuple[int, int] | None
    sha256: str
    at: int
    """Where its line begins in the file."""


class Ledger:
    """An open ledger, locked until close() or the end of the process.

    Raises ValueError where the file is no ledger, or where another run has it; OSError where it cannot be written.
    """

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        """`anew`: what it holds is dropped, when the first row is written and not before: the model may fail to load."""
        self.path = path
        self.known: dict[str, Known] = {}
        self._fd = _opened(path)
        self._end, self._synced_at = 0, 0.0
        self._holds_old = anew
        try:
            lock(self._fd, os.fspath(path))
            if not (path.exists() and os.path.samestat(os.fstat(self._fd), path.stat())):
                raise ValueError(f"{path}: another run has just written it anew: start again")
            if not anew:
                self._end = self._read()
                os.ftruncate(self._fd, self._end)  # a torn last line
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> int:
        """Remembers all rows; returns where the last whole one ends."""
        end = 0
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for at, end, row in whole_rows(file, os.fspath(self.path)):  # noqa: B007
                self._remember(row, at)
        return end

    def _remember(self, row: Row, at: int) -> None:
        size, time_ns = row.get("bytes"), row.get("mtime_ns")
        stamp = (size, time_ns) if isinstance(size, int) and isinstance(time_ns, int) else None
        self.known[row["path"]] = Known(
            row["status"] == "ok", str(row.get("settings")), stamp, row.get("sha256") or "", at
        )

    def append(self, row: Row) -> None:
        """Adds a row, whole or not at all."""
        line, at = line_of(row), self._end
        try:
            if self._holds_old:
                os.ftruncate(self._fd, 0)
                self._holds_old = False
            os.lseek(self._fd, at, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, at)
            if isinstance(error, OSError):
                error.filename = os.fspath(self.path)
            raise
        self._end = at + len(line)
        self._remember(row, at)
        if time.monotonic() - self._synced_at > _SYNC_SECONDS:
            os.fsync(self._fd)
            self._synced_at = time.monotonic()

    def row(self, path: str) -> Row:
        """The row of a picture that is known."""
        with open(os.dup(self._fd), "rb") as file:
            file.seek(self.known[path].at)
            return _row(file.readline(), f"{self.path}: {path}")

    def rows(self) -> Iterator[Row]:
        """All rows, in the order in which they were finished."""
        with open(self.path, "rb") as file:
            for _, _, row in whole_rows(file, os.fspath(self.path)):
                yield row

    def forget(self, paths: Collection[str]) -> None:
        """Takes the rows of `paths` out: the file is written again and renamed, so that it is always whole."""
        if not paths:
            return
        with replacing(Path(os.path.realpath(self.path)), n_bytes=self._end) as file:  # a link stays one
            for row in self.rows():
                if row["path"] not in paths:
                    file.write(line_of(row))
            file.flush()
            fd = os.dup(file.fileno())
            lock(fd, os.fspath(self.path))  # before it has its name: another run never finds it unlocked
        os.close(self._fd)
        self._fd, self.known = fd, {}
        self._end = self._read()

    def close(self) -> None:
        """Ends the lock; a file without rows is removed."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)
        if not self._end and not self._holds_old:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._fd)


def whole_rows(file: BinaryIO, name: str) -> Iterator[tuple[int, int, Row]]:
    """Where each row begins and ends in a file, and the row; a torn last line is none."""
    at = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        yield at, at + len(line), _row(line, f"{name}: line {number}")
        at += len(line)


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    is_ours = isinstance(row, dict) and isinstance(row.get("path"), str) and "status" in row
    if not is_ours or (row["status"] == "ok" and not isinstance(row.get("caption"), str)):
        raise ValueError(
            f"{where} is no row of captions (need path and status, and a caption where that is ok): "
            "name another output"
        )
    found: dict[str, Any] = row
    return found


def _opened(path: Path) -> int:
    if path.is_dir() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        raise ValueError(f"{path}: exists and is not a regular file")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", os.fspath(path.parent))
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
