"""Files of pictures: decoded with Pillow, upright, RGB."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal, TypeAlias

from PIL import Image, ImageFile

from . import _jpeg
from ._leaving import leavable
from ._picture_heads import HEAD_BYTES, MAX_BYTES, check_head
from ._pixels import Clear, Color, check_size, content_hash, to_rgb, with_clear
from .errors import ImageError

OnTruncated: TypeAlias = Literal["error", "pad"]

MAX_CHUNKS = 65_536
_LARGE = 1 << 24
_SMALL_BLOCK = 1 << 14  # bytes of a large picture decoded at a time: they may hold a thousand times as many
# What Pillow decodes, or some of it, in one call. WebP, too, but while it does no other thread runs Python.
_IN_ONE_CALL = ("JPEG", "TIFF", "AVIF", "HEIF")
_LONG = 1 << 21  # pixels from which on such a call may take a tenth of a second
_CORNER = 4  # pixels: less than the smallest block of a JPEG
_ENOUGH = 2  # other endings of a file that has its own
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


def read(file: BinaryIO, name: str, background: Color, on_truncated: OnTruncated) -> Image.Image:
    """The picture in a file that can seek; errors call it `name`."""
    plugin = check_head(file.read(HEAD_BYTES), name)
    file.seek(0)
    kind = plugin.format

    def picture(file: BinaryIO) -> Image.Image:
        with plugin(file) as image:
            check_size(image.size, name)
            if kind not in _IN_ONE_CALL or image.width * image.height < _LONG:
                return upright_rgb(image, background, on_truncated)
        own = _owned(file)
        return leavable(lambda: at_once(own))

    def at_once(file: BinaryIO) -> Image.Image:
        with file, plugin(file) as image:
            return upright_rgb(image, background, on_truncated)

    def decode() -> Image.Image:
        if kind == "JPEG":
            return _read_jpeg(_whole(file, name), name, picture, on_truncated)
        if kind == "PNG":
            _check_png(file, name)
        return picture(file)

    return decoded(f"{name}: damaged or unusable {kind} image", decode)


def _read_jpeg(
    data: bytes, name: str, picture: Callable[[BinaryIO], Image.Image], on_truncated: OnTruncated
) -> Image.Image:
    """A JPEG is used if its pixels are all there: if nothing behind them matters. Where it has its last marker, one
    that ends in a flat colour may be without pixels, for which decoders put the last colour.
    """
    data = _jpeg.light(data, name)
    _jpeg.check_scans(data, name)
    has_end = _jpeg.is_ended(data)
    shown = picture(io.BytesIO(data if has_end else _jpeg.ended(data)))
    if on_truncated == "pad" or (has_end and not _has_flat_corner(shown)):
        return shown
    content = content_hash(shown)
    others = itertools.islice(_jpeg.ended_otherwise(data), _ENOUGH if has_end else None)
    if not (has_end or _jpeg.has_all_scans(data)) or any(
        content_hash(picture(io.BytesIO(other))) != content for other in others
    ):
        raise ValueError('the file ends before its last pixel (on_truncated="pad" shows what there is)')
    return shown


def _has_flat_corner(image: Image.Image) -> bool:
    """Whether a corner has one colour; which one the file ends with depends on the orientation."""
    width, height = image.size
    return any(
        image.crop((x, y, min(x + _CORNER, width), min(y + _CORNER, height))).getcolors(1) is not None
        for x in (0, max(0, width - _CORNER))
        for y in (0, max(0, height - _CORNER))
    )


def _owned(file: BinaryIO) -> BinaryIO:
    """The same file from its beginning, for a thread that may outlive who opened it."""
    if isinstance(file, io.BytesIO):
        return io.BytesIO(file.getbuffer())
    own = os.fdopen(os.dup(file.fileno()), "rb")
    own.seek(0)
    return own


def _check_png(file: BinaryIO, name: str) -> None:
    """Refuse a picture of more chunks than any has: Pillow looks at each in Python."""
    n_chunks = 0
    file.seek(8)
    while len(head := file.read(8)) == 8:
        n_chunks += head[4:] != b"IDAT"
        if n_chunks > MAX_CHUNKS:
            raise ImageError(f"{name}: PNG of more than {MAX_CHUNKS:,} chunks besides its pixels")
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(0)


def _whole(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: more than {MAX_BYTES:,} bytes")
    return data


def _load(image: Image.Image, on_truncated: OnTruncated) -> None:
    """Decode; what is missing at the end stays as Pillow leaves it, if that is wanted."""
    if isinstance(image, ImageFile.ImageFile) and image.width * image.height > _LARGE:
        image.decodermaxblock = _SMALL_BLOCK
    try:
        image.load()
    except OSError as error:
        if (
            on_truncated != "pad"
            or "truncated" not in str(error)
            or not isinstance(image, ImageFile.ImageFile)
        ):
            raise
        image.tile = []
        image.load()


@contextlib.contextmanager
def _position_kept(file: BinaryIO) -> Iterator[None]:
    position = file.tell()
    try:
        yield
    finally:
        file.seek(position)


def decoded(what: str, decode: Callable[[], Image.Image]) -> Image.Image:
    """Run `decode`; what Pillow raises becomes ImageError, except errors of the system (with an errno)."""
    try:
        return decode()
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{what}: {reason}") from error


def upright_rgb(image: Image.Image, background: Color, on_truncated: OnTruncated = "error") -> Image.Image:
    """The RGB picture of one that Pillow has opened, as its EXIF orientation wants it."""
    clear = _clear(image)
    low = _low_bytes(image)
    _load(
        image, on_truncated
    )  # first: Pillow turns a TIFF upright while loading it, and takes its orientation away
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
