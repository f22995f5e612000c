"""Looking into GGUF files: metadata and tensor table, without loading the model."""

from __future__ import annotations

import os

from ._lib import GgufHandle, TensorInfo

__all__ = ["GgufFile", "TensorInfo"]


class GgufFile:
    """A GGUF file: `version`, `alignment`, `metadata` (key to value) and `tensors`.

    Raises FileNotFoundError, or ModelFileError where the file is damaged or no GGUF file.
    """

    version: int
    alignment: int
    metadata: dict[str, object]
    tensors: list[TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        handle = GgufHandle(path)
        try:
            self.version, self.alignment = handle.header()
            self.metadata = handle.metadata()
            self.tensors = handle.tensors()
        finally:
            handle.close()
