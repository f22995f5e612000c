"""Pictures from wherever they are: decoded with Pillow, upright, RGB. What is cut from them is in `views`."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._picture_files import OnTruncated, decoded, is_picture, read, upright_rgb
from ._pixels import MAX_PIXELS as MAX_PIXELS
from ._pixels import MAX_SIDE as MAX_SIDE
from ._pixels import Color as Color
from ._pixels import check_size as check_size
from ._pixels import content_hash as content_hash
from ._pixels import from_array
from .errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]"

WHITE: Color = (255, 255, 255)


def load_image(
    source: ImageSource, *, background: Color = WHITE, on_truncated: OnTruncated = "error"
) -> Image.Image:
    """Decode `source` into a new upright RGB picture.

    `source` is a path, a ``data:`` URL, the bytes of a file (JPEG, PNG, WebP, GIF, BMP, TIFF; of an animation
    the first frame), a ``PIL.Image.Image``, or an array: uint8, or floats in 0..1, shaped [H, W], [H, W, 1],
    [H, W, 3] or [H, W, 4] (RGBA).

    - The EXIF orientation is applied, broken EXIF is ignored; so are colour profiles, as the reference does.
    - Transparent parts show `background`.
    - 16-bit, 32-bit and float greys are scaled, not clipped: white is 65535 for 16-bit pictures; for 32-bit
      integers the same, and for floats the smallest of 1, 255 and 65535 that no pixel exceeds; beyond 65535,
      the brightest pixel.

    Raises ImageError for everything that is not a sound picture of at most 178,956,970 pixels and 65,535 a
    side, OSError (FileNotFoundError, PermissionError, ...) for a path that cannot be read, TypeError for
    another type.
    """
    if on_truncated not in ("error", "pad"):
        raise ValueError(f"on_truncated={str(on_truncated)[:40]!r}: need 'error' or 'pad'")
    if isinstance(source, np.ndarray):
        return from_array(source, background)
    if isinstance(source, Image.Image):
        check_size(source.size, "PIL image")
        return decoded("PIL image", lambda: upright_rgb(source, background, on_truncated))
    if isinstance(source, bytes | bytearray | memoryview):
        return read(io.BytesIO(source), "image bytes", background, on_truncated)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return read(io.BytesIO(decode_data_url(source)), "image in a data: URL", background, on_truncated)
    if isinstance(source, str | os.PathLike):
        with _open_regular_file(source) as file:
            return read(file, os.fsdecode(source), background, on_truncated)
    raise TypeError(
        f"image of type {type(source).__name__}: need a path, bytes, a PIL image or a NumPy array"
    )


def decode_data_url(text: str) -> bytes:
    """The bytes in a ``data:`` URL of any media type, or none. Raises ImageError if it is no such URL.

    The base64 may lack its padding, use the URL-safe alphabet and be percent-escaped. Where the URL does not
    say that it is base64, its bytes are taken if they begin as a picture does.
    """
    head, comma, body = text.partition(",")
    is_url = bool(comma and re.match("data:", head, re.IGNORECASE))
    if is_url and re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        try:
            return _base64(body)
        except ValueError as error:  # binascii.Error is one
            raise ImageError(f"data: URL: invalid base64 ({error})") from None
    if is_url:
        for decode in (unquote_to_bytes, _base64):
            with contextlib.suppress(ValueError):
                if is_picture(data := decode(body)):
                    return data
    raise ImageError(f"not a base64 data: URL: starts with {text[:32]!r}, need 'data:image/...;base64,'")


def _base64(text: str) -> bytes:
    if "%" in text:
        text = unquote(text, errors="strict")
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    name = os.fsdecode(path)
    if os.path.isdir(path):
        raise ImageError(f"{name}: a folder, not an image file")
    nonblocking = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO must not wait for a writer
    descriptor = os.open(path, os.O_RDONLY | nonblocking | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{name}: not a regular file (for a pipe or a device, read it and pass the bytes)")
    return os.fdopen(descriptor, "rb")


_OF_VIEWS = ("ImageSpec", "Views", "anyres", "best_resolution", "pad", "preprocess", "tile_grid")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What was here before `views` was a module of its own."""
        if name not in _OF_VIEWS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import views

        return getattr(views, name)
