"""A GGUF file, or all files of a split one, read for rewriting: metadata as bytes, tensors in pieces."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._lib import GgufHandle, TensorInfo
from .errors import ModelFileError, ModelMismatchError

_MAX_FILES = 999


class SourceFile:
    """One file. The library's reader has checked its structure; its bytes are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = GgufHandle(path)
        try:
            self.metadata: dict[str, Any] = handle.metadata().small()  # all that decides how
            self.records = handle.records()
            self.tensors = handle.tensors()
        finally:
            handle.close()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes [offset, offset + n_bytes). Raises ModelFileError where the file has shrunk meanwhile."""
        data = np.empty(n_bytes, np.uint8)
        view = data.data
        self._file.seek(offset)
        n_read = 0
        while n_read < n_bytes:
            try:
                n = self._file.readinto(view[n_read:])
            except OSError as error:
                error.filename = os.fspath(self.path)
                raise
            if not n:
                raise ModelFileError(
                    f"{self.path}: ends at byte {offset + n_read}, it was longer when opened"
                )
            n_read += n
        return data

    def count(self, key: str) -> int | None:
        """The integer under `key`; None where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in its file, as rows of its last dimension."""

    file: SourceFile
    info: TensorInfo

    @property
    def n_rows(self) -> int:
        return math.prod(self.info.shape[:-1])

    @property
    def n_per_row(self) -> int:
        return self.info.shape[-1]

    def rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes of rows [start, stop)."""
        row_bytes = self.info.n_bytes // self.n_rows
        return self.file.read(self.info.offset + start * row_bytes, (stop - start) * row_bytes)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[list[SourceFile]]:
    """The file, or all files of the split model whose first one `path` is."""
    with contextlib.ExitStack() as stack:

        def open_one(name: Path) -> SourceFile:
            file = SourceFile(name)
            stack.callback(file.close)
            return file

        first = open_one(path)
        n = first.count("split.count") or 1
        files = [first]
        if n > 1:
            files += [open_one(name) for name in _other_names(path, n)]
        _check_split(files)
        yield files


def tensors_of(files: Sequence[SourceFile]) -> list[SourceTensor]:
    """All tensors in file order. Raises ModelMismatchError where a name stands in two files."""
    found: dict[str, SourceTensor] = {}
    for file in files:
        for info in file.tensors:
            if info.name in found:
                raise ModelMismatchError(f"{file.path}: {info.name} stands in another file of the model too")
            found[info.name] = SourceTensor(file, info)
    return list(found.values())


def _other_names(first: Path, n: int) -> list[Path]:
    tail = f"-00001-of-{n:05d}.gguf"
    if n > _MAX_FILES or not first.name.endswith(tail):
        raise ModelMismatchError(f"{first}: first of {n} files, its name must end in {tail}")
    stem = first.name.removesuffix(tail)
    return [first.with_name(f"{stem}-{i:05d}-of-{n:05d}.gguf") for i in range(2, n + 1)]


def _check_split(files: Sequence[SourceFile]) -> None:
    """As the loader does: a single file may say nothing, or as merged ones do that it is the first of 0."""
    n = len(files)
    for i, file in enumerate(files):
        found = (file.count("split.no"), file.count("split.count"))
        alone = n == 1 and found[0] in (None, 0) and found[1] in (None, 0, 1)
        if found != (i, n) and not alone:
            raise ModelMismatchError(f"{file.path}: split.no and split.count are {found}, need {(i, n)}")
    n_tensors = sum(len(file.tensors) for file in files)
    wanted = files[0].count("split.tensors.count")
    if wanted is not None and wanted != n_tensors:
        raise ModelMismatchError(
            f"{files[0].path}: split.tensors.count is {wanted}, the {n} files hold {n_tensors}"
        )
