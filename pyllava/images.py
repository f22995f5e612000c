"""Pictures from wherever they are: decoded with Pillow, upright, RGB. What is cut from them is in `views`."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._picture_files import OnTruncated, decoded, read, upright_rgb
from ._pixels import MAX_PIXELS as MAX_PIXELS
from ._pixels import MAX_SIDE as MAX_SIDE
from ._pixels import Color as Color
from ._pixels import check_size as check_size
from ._pixels import content_hash as content_hash
from ._pixels import from_array
from ._sources import Readable, is_data_url, local_path, open_path, open_stdin, open_stream, shown
from ._sources import decode_data_url as decode_data_url

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any] | HasArray | Readable"
"""What a picture may be given as: see `load_image`."""


class HasArray(Protocol):
    """A tensor: what NumPy can read as an array."""

    def __array__(self) -> npt.NDArray[Any]: ...


WHITE: Color = (255, 255, 255)


def load_image(
    source: ImageSource, *, background: Color = WHITE, on_truncated: OnTruncated = "error"
) -> Image.Image:
    """Decode `source` into a new upright RGB picture.

    ======================  =====================================================================================
    source                  what is taken
    ======================  =====================================================================================
    path                    str or PathLike, ``~`` expanded; a pipe or device is read to its end, of 1 GiB at most
    ``file:`` URL           as a path
    ``data:`` URL           base64 of any alphabet, with or without padding, or percent-escaped
    bytes-like              the bytes of a file: bytes, bytearray, memoryview, mmap
    file object             what has `read()` and gives bytes; from its beginning where it can seek
    ``PIL.Image.Image``     any mode; it is not changed
    NumPy array             uint8, uint16 (white is 65535), bool, floats in 0..1, clipped up to 0.001 beyond;
                            [H, W], [H, W, 1], [H, W, 3], [H, W, 4] (RGBA), and any with axes of 1 before them
    tensor                  what has `__array__` or `__array_interface__`; [3, H, W], too
    ======================  =====================================================================================

    Files are JPEG, PNG, WebP, GIF, BMP or TIFF; AVIF where the installed Pillow reads it, HEIC where pillow-heif
    (extra ``[heif]``) is installed. Of an animation the first frame is taken. Nothing is fetched from the web.

    - The EXIF orientation is applied, broken EXIF is ignored; so are colour profiles, as the reference does.
    - Transparent parts show `background`.
    - 16-bit, 32-bit and float greys are scaled, not clipped: white is 65535 for 16-bit pictures; for 32-bit
      integers the same, and for floats the smallest of 1, 255 and 65535 that no pixel exceeds; beyond 65535,
      the brightest pixel.
    - A file that was cut is used if all pixels are there, and refused otherwise; ``on_truncated="pad"`` shows what
      there is of a JPEG, PNG, GIF, BMP or TIFF, and grey (JPEG) or nothing, black or transparent, for the rest.
    - Opening never hangs: a named pipe without a writer is refused after 5 seconds. The end of a pipe that has one
      is waited for; Ctrl-C ends that.

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
    if any(hasattr(source, name) for name in ("__array__", "__array_interface__")):
        return from_array(_as_array(source), background, channels_first=True)
    if isinstance(source, str) and is_data_url(source):
        return read(io.BytesIO(decode_data_url(source)), "image in a data: URL", background, on_truncated)
    if isinstance(source, str | os.PathLike):
        path = local_path(source)
        with open_path(path) as file:
            return read(file, shown(path), background, on_truncated)
    if (held := _bytes_of(source)) is not None:
        return read(held, "image bytes", background, on_truncated)
    if callable(getattr(source, "read", None)):
        stream = open_stream(source)
        return read(stream, stream.name, background, on_truncated)
    raise TypeError(
        f"image of type {type(source).__name__[:100]}: need a path, bytes, a PIL image or a NumPy array "
        "(or a data: URL, a file object, a tensor)"
    )


def open_source(text: str) -> ImageSource:
    """The picture that a word of a command line names, for `load_image`: "-" is standard input, read now.

    Everything else is what `load_image` takes as a text. What cannot be found is an error here already: a typing
    error in the last name must not cost the answers before it.
    """
    if text == "-":
        return open_stdin()
    if not is_data_url(text):
        try:
            os.stat(local_path(text))
        except OSError as error:
            raise type(error)(error.errno, error.strerror, shown(text)) from None
    return text


def source_name(source: object) -> str:
    """What messages call a source, in at most 200 characters."""
    if isinstance(source, str | os.PathLike):
        return "image in a data: URL" if is_data_url(source) else shown(os.fsdecode(source))
    name = getattr(source, "name", None)
    return shown(name) if isinstance(name, str) else "image"


def _as_array(source: Any) -> npt.NDArray[Any]:
    """A tensor as an array; PyTorch's leave their graph and their device for it."""
    try:
        for step in ("detach", "cpu"):
            source = getattr(source, step, lambda same=source: same)()
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, say
        reason = shown(" ".join(str(error).split()))
        raise TypeError(
            f"{type(source).__name__[:60]}: {reason}: need one of uint8, or of floats in 0..1"
        ) from error


def _bytes_of(source: Any) -> io.BytesIO | None:
    """What lies behind a bytes-like object; None for another."""
    try:
        view = memoryview(source)
    except (TypeError, BufferError):
        return None
    return io.BytesIO(source if isinstance(source, bytes) else view.tobytes())


_OF_VIEWS = ("ImageSpec", "Views", "anyres", "best_resolution", "pad", "preprocess", "squash", "tile_grid")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What was here before `views` was a module of its own."""
        if name not in _OF_VIEWS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import views

        return getattr(views, name)
