"""Pictures from wherever they are: decoded with Pillow, upright, RGB. What is cut from them is in `views`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from ._pixels import MAX_PIXELS as MAX_PIXELS
from ._pixels import MAX_SIDE as MAX_SIDE
from ._pixels import Clear, from_array, to_rgb, with_clear
from ._pixels import Color as Color
from ._pixels import check_size as check_size
from ._pixels import content_hash as content_hash
from .errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]"

WHITE: Color = (255, 255, 255)
MAX_SCANS = 100
"""The most scans a JPEG may have; progressive pictures have about ten."""
_JPEG_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")  # not the escapes and restarts inside a scan
_FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, background: Color = WHITE) -> Image.Image:
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
    if isinstance(source, np.ndarray):
        return from_array(source, background)
    if isinstance(source, Image.Image):
        check_size(source.size, "PIL image")
        return _decode("PIL image", lambda: _upright_rgb(source, background))
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), "image bytes", background)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read(io.BytesIO(decode_data_url(source)), "image in a data: URL", background)
    if isinstance(source, str | os.PathLike):
        with _open_regular_file(source) as file:
            return _read(file, os.fsdecode(source), background)
    raise TypeError(
        f"image of type {type(source).__name__}: need a path, bytes, a PIL image or a NumPy array"
    )


def decode_data_url(text: str) -> bytes:
    """The bytes in a base64 ``data:`` URL of any media type. Raises ImageError if it is no such URL."""
    head, comma, body = text.partition(",")
    if not comma or not re.fullmatch(r"data:[^,]*;base64", head, re.IGNORECASE):
        raise ImageError(f"not a base64 data: URL: starts with {text[:32]!r}, need 'data:image/...;base64,'")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data: URL: invalid base64 ({error})") from None


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


def _decoder(head: bytes) -> type[ImageFile.ImageFile] | None:
    """The Pillow plugin for a file that starts with `head`.

    Not Image.open: it warns about large pictures (and silencing a warning changes the state of the whole
    process), and a file that no listed format accepts makes it import every other plugin.
    """
    if head.startswith(b"\xff\xd8\xff"):
        from PIL.JpegImagePlugin import JpegImageFile as Jpeg

        return Jpeg
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        from PIL.PngImagePlugin import PngImageFile as Png

        return Png
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        from PIL.WebPImagePlugin import WebPImageFile as WebP

        return WebP
    if head.startswith((b"GIF87a", b"GIF89a")):
        from PIL.GifImagePlugin import GifImageFile as Gif

        return Gif
    if head.startswith(b"BM"):
        from PIL.BmpImagePlugin import BmpImageFile as Bmp

        return Bmp
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        from PIL.TiffImagePlugin import TiffImageFile as Tiff

        return Tiff
    return None


def _read(file: BinaryIO, name: str, background: Color) -> Image.Image:
    head = file.read(16)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: empty")
    plugin = _decoder(head)
    if plugin is None:
        raise ImageError(f"{name}: not a {_FORMATS} image")
    kind = plugin.format

    def decode() -> Image.Image:
        with plugin(file) as image:
            check_size(image.size, name)
            if kind == "JPEG":
                _check_jpeg(file, name)
            if kind == "PNG":
                _check_png(file)
            return _upright_rgb(image, background)

    return _decode(f"{name}: damaged or unusable {kind} image", decode)


def _check_jpeg(file: BinaryIO, name: str) -> None:
    """Refuse a progressive picture made to be decoded ten thousand times over."""
    with _position_kept(file):
        file.seek(0)
        data = file.read()
    if data.count(b"\xff\xda") <= MAX_SCANS:  # also counts thumbnails and noise in metadata
        return
    n_scans, at = 0, 2
    while found := _JPEG_MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        n_scans += kind == 0xDA
        if kind == 0xD9:
            break
        at += int.from_bytes(data[at : at + 2], "big")
    if n_scans > MAX_SCANS:
        raise ImageError(f"{name}: JPEG of {n_scans:,} scans, at most {MAX_SCANS}")


def _check_png(file: BinaryIO) -> None:
    """Pillow ignores what is missing after the pixels: look for the last chunk."""
    with _position_kept(file):
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] == b"IEND" and len(file.read(4)) == 4:
                return
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    raise ValueError("the file ends before its IEND chunk")


@contextlib.contextmanager
def _position_kept(file: BinaryIO) -> Iterator[None]:
    position = file.tell()
    try:
        yield
    finally:
        file.seek(position)


def _decode(what: str, decode: Callable[[], Image.Image]) -> Image.Image:
    """Run `decode`; what Pillow raises becomes ImageError, except errors of the system (with an errno)."""
    try:
        return decode()
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{what}: {reason}") from error


def _upright_rgb(image: Image.Image, background: Color) -> Image.Image:
    clear = _clear(image)
    low = _low_bytes(image)
    image.load()  # first: Pillow turns a TIFF upright while loading it, and takes its orientation away
    turn = None
    # EXIF is a nest of optional parsers; none of them may cost the picture.
    with contextlib.suppress(Exception):
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    if low is not None:
        return to_rgb(with_clear(image, low, image.info["transparency"]), background, turn)
    return to_rgb(image, background, turn, image.info.get("transparency") if clear is None else clear)


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """The lower bytes of a PNG of 16-bit colours, one of them transparent: Pillow decodes the upper ones only."""
    tiles, file = getattr(image, "tile", None), getattr(image, "fp", None)
    if not tiles or tiles[0][3] != "RGB;16B" or "transparency" not in image.info or file is None:
        return None
    from PIL.PngImagePlugin import PngImageFile

    with _position_kept(file):
        file.seek(0)
        with PngImageFile(file) as low:
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            low.load()
            copy: Image.Image = low.copy()
            return copy


def _clear(image: Image.Image) -> Clear:
    """The transparent grey of a PNG of 2 or 4 bits, as deep as the pixels that Pillow gives; else None."""
    tiles = getattr(image, "tile", None)  # of a file that is not loaded yet
    n_bits = {"L;2": 2, "L;4": 4}.get(str(tiles[0][3])) if tiles else None
    grey = image.info.get("transparency")
    if n_bits is None or not isinstance(grey, int):
        return None
    return grey * 255 // ((1 << n_bits) - 1)


_OF_VIEWS = ("ImageSpec", "Views", "anyres", "best_resolution", "pad", "preprocess", "tile_grid")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What was here before `views` was a module of its own."""
        if name not in _OF_VIEWS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import views

        return getattr(views, name)
