"""Looking into GGUF files: metadata and tensor table, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ._lib import GgufHandle, TensorInfo

__all__ = ["GgufFile", "TensorInfo"]


class GgufFile:
    """A GGUF file: `version`, `alignment`, `metadata` (key to value) and `tensors`.

    A value of the metadata is read when it is asked for: arrays of numbers are NumPy arrays, arrays of texts lists. The
    file stays open until then, or as long as `metadata` lives.

    Raises FileNotFoundError, or ModelFileError where the file is damaged or no GGUF file; `metadata[key]` raises the
    latter where the file was changed in its place in the meantime.
    """

    version: int
    alignment: int
    metadata: Mapping[str, object]
    tensors: list[TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        handle = GgufHandle(path)
        self.version, self.alignment = handle.header()
        self.metadata = handle.metadata()
        self.tensors = handle.tensors()
