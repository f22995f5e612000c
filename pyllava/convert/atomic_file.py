"""Writing a file so that its final name holds either nothing, the old file, or the whole new one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def replacing(path: Path, *, n_bytes: int, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield `<path>.part` beside the target, empty; when the block ends well, flush it to disk and rename it
    to `path`.

    On any exception, Ctrl-C included, the part file is removed and `path` is as it was. Refused at once: a
    target that is one of `inputs`, or no regular file, and a disk with less than `n_bytes` free.
    """
    part = path.with_name(path.name + ".part")
    _check_target(path, part, n_bytes, inputs)
    part.unlink(missing_ok=True)  # what a killed run left behind
    file = open(part, "xb")  # noqa: SIM115
    ours = os.fstat(file.fileno())
    try:
        with file:  # open until then: no other file gets its number
            yield part
            os.fsync(file.fileno())
            if not _is(part, ours):
                raise OutputError(f"{path}: another program writes this file too")
        os.replace(part, path)
    except BaseException as error:
        if _is(part, ours):
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def _is(path: Path, file: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), file)
    return False


def _check_target(path: Path, part: Path, n_bytes: int, inputs: Iterable[Path]) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder to write into")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: exists and is not a regular file")
    for source in inputs:
        if _same(path, source):
            raise OutputError(f"{path}: is both input and output")
        if _same(part, source):
            raise OutputError(f"{part}: is an input, and {path} is written under that name until complete")
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OutputError(f"{path}: needs {n_bytes / 1e6:.1f} MB, {path.parent} has {free / 1e6:.1f} MB free")


def _same(path: Path, source: Path) -> bool:
    return path.exists() and source.exists() and path.samefile(source)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
