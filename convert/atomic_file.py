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
    _check_target(path, n_bytes, inputs)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # what a killed run left behind
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _check_target(path: Path, n_bytes: int, inputs: Iterable[Path]) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder to write into")
    if path.exists():
        if not path.is_file():
            raise OutputError(f"{path}: exists and is not a regular file")
        for source in inputs:
            if source.exists() and path.samefile(source):
                raise OutputError(f"{path}: is both input and output")
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OutputError(f"{path}: needs {n_bytes / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
