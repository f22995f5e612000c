"""Which projector image rows come from: a name for its weights that is quick to find."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .gguf import GgufFile

_LOOKED_AT = 64  # bytes in the middle of each tensor: training changes all of them


@dataclass(frozen=True)
class Projector:
    """A vision tower and projector. Two are the same if their digests are, whatever their files are called."""

    name: str = field(compare=False)
    """The file's name, for messages."""
    digest: str
    """32 hexadecimal digits: of the tensors' names, types and shapes, some bytes of each, and the settings of the tower."""

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:8]})"


def projector_of(path: str | os.PathLike[str]) -> Projector:
    """The projector in a GGUF file. Its weights are not read as a whole: 650 MB take milliseconds."""
    file, digest = GgufFile(path), hashlib.blake2b(digest_size=16)
    digest.update(_settings(file.metadata).encode())
    with open(path, "rb") as weights:
        for tensor in sorted(file.tensors, key=lambda tensor: tensor.offset):
            digest.update(f"{tensor.name} {tensor.type} {tensor.shape}:".encode())
            weights.seek(tensor.offset + max(0, tensor.n_bytes - _LOOKED_AT) // 2)
            digest.update(weights.read(min(tensor.n_bytes, _LOOKED_AT)))
    return Projector(Path(path).name, digest.hexdigest())


def _settings(metadata: Mapping[str, object]) -> str:
    """What the file says of how pictures are seen; not its title and authors."""
    told = {key: metadata[key] for key in sorted(metadata) if key.startswith("clip.")}
    return repr([(key, v.tolist() if isinstance(v, np.ndarray) else v) for key, v in told.items()])
