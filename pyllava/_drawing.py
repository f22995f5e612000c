"""Writing what was drawn: as a file that appears whole, or as the bytes that a notebook shows."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ._part_file import replacing


def format_of(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that a file's suffix tells. Raises ValueError if it writes none such."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(
            f"{Path(path).name!r}: need a name that ends in .png, or in another suffix of a picture"
        )
    return kind


def save(image: Image.Image, path: str | os.PathLike[str], inputs: Iterable[Path] = ()) -> None:
    """Writes the file as a whole or not at all, and never over one of `inputs`."""
    data = encoded(image, format_of(path))
    with replacing(Path(path), n_bytes=len(data), inputs=inputs, durable=False) as file:
        file.write(data)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of a picture file."""
    stream = io.BytesIO()
    image.save(stream, kind, optimize=True)
    return stream.getvalue()
