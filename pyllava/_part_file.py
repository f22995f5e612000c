"""Writing a file so that its final name holds either nothing, the old file, or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(
    path: Path, *, n_bytes: int, inputs: Iterable[Path] = (), durable: bool = True
) -> Iterator[BinaryIO]:
    """Yield a new file ``<path>.part``; when the block ends well, sync it to disk and rename it to `path`.

    On any exception, Ctrl-C included, the part file is removed and `path` is as it was. It refuses at once a
    folder that does not exist, a target that is one of `inputs` or not a regular file, and a disk with less
    than `n_bytes` free. `durable`: False does not wait for the disk, which a machine that loses power notices.
    """
    part = path.with_name(path.name + ".part")
    _check_target(path, part, n_bytes, inputs)
    part.unlink(missing_ok=True)  # what a killed run left behind
    file = open(part, "xb+")  # noqa: SIM115
    ours = os.fstat(file.fileno())
    try:
        with file:  # errors of closing it are handled below, too
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if not _is(part, ours):
                raise FileExistsError(errno.EEXIST, "another program writes this file too", os.fspath(path))
        os.replace(part, path)
    except BaseException as error:
        if _is(part, ours):
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        raise
    if durable:
        _sync_folder(path.parent)


def check_new(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises FileExistsError where `path` is a file already. One of `inputs` is left to `replacing`, which says that it is."""
    if (path.is_file() or path.is_symlink()) and not any(path.exists() and path.samefile(i) for i in inputs):
        told = "exists already; --force, in Python overwrite=True, replaces it"
        raise FileExistsError(errno.EEXIST, told, os.fspath(path))


def _is(path: Path, file: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), file)
    return False


def _check_target(path: Path, part: Path, n_bytes: int, inputs: Iterable[Path]) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", os.fspath(path.parent))
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{path}: exists and is not a regular file")
        if any(path.samefile(source) for source in inputs):
            raise ValueError(f"{path}: is both input and output")
    if part.exists() and any(part.samefile(source) for source in inputs):
        raise ValueError(f"{part}: is an input, and {path} is written under that name until it is complete")
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        needs = f"needs {n_bytes / 1e6:.1f} MB, {path.parent} has {free / 1e6:.1f} MB free"
        raise OSError(errno.ENOSPC, needs, os.fspath(path))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
