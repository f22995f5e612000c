"""Pictures from wherever they are: decoded with Pillow, upright, RGB. What is cut from them is in `views`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from .errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]"
Color: TypeAlias = tuple[int, int, int]

MAX_PIXELS = 178_956_970
"""The largest picture accepted, in pixels: where Pillow, too, starts to refuse (512 MiB as RGB)."""
MAX_SIDE = 65_535
"""The longest side accepted, in pixels: the longest that JPEG can hold."""

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
        return _from_array(source, background)
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


def content_hash(image: Image.Image) -> bytes:
    """16 bytes (BLAKE2b) that name the content of an RGB picture: its size and its pixels."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


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


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises ImageError for a picture without pixels, and one of more than are accepted."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} is {width * height:,} pixels, at most {MAX_PIXELS:,}")
    if max(size) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height}, sides of at most {MAX_SIDE:,} pixels")


def _upright_rgb(image: Image.Image, background: Color) -> Image.Image:
    image.load()  # first: Pillow turns a TIFF upright while loading it, and takes its orientation away
    turn = None
    # EXIF is a nest of optional parsers; none of them may cost the picture.
    with contextlib.suppress(Exception):
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    return _to_rgb(image if turn is None else image.transpose(turn), background)


def _to_rgb(image: Image.Image, background: Color) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_grey(image)
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or image.mode == "RGBa" or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}  # an orientation left behind would be applied again
    return rgb


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError(f"grey values {low:g}..{high:g}, need finite ones from 0 up")
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((w for w in whites if high <= w), high)
    grey = np.empty(values.shape, np.uint8)
    for row, out in zip(values, grey, strict=True):  # by row: a float copy of a whole scan would be large
        out[:] = np.rint(row.astype(np.float64) * 255 / white)
    return Image.fromarray(grey).convert("RGB")


def _from_array(array: npt.NDArray[Any], background: Color) -> Image.Image:
    shape = list(array.shape)
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(f"array of shape {shape}: need [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise TypeError(f"array of {array.dtype}: need uint8, or floats in 0..1")
    check_size((shape[1], shape[0]), "image array")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN, too, ends here
            raise ImageError(f"float array with values {low:g}..{high:g}: need 0..1 (or uint8 for 0..255)")
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), background)


_OF_VIEWS = ("ImageSpec", "Views", "anyres", "best_resolution", "pad", "preprocess", "tile_grid")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What was here before `views` was a module of its own."""
        if name not in _OF_VIEWS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import views

        return getattr(views, name)
