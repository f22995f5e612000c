"""Pixels of any kind into RGB: greys of any depth, palettes, transparency, arrays.

Large pictures are converted in bands. No step then needs memory for a second picture, and Python gets
control, so that Ctrl-C works, after every million pixels or so. All steps take each pixel by itself: the
bytes are those of the whole picture converted at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError

Color: TypeAlias = tuple[int, int, int]
Clear: TypeAlias = "int | bytes | tuple[int, ...] | None"
"""What a picture without an alpha channel says is transparent: Pillow's ``info["transparency"]``."""

MAX_PIXELS = 178_956_970
"""The largest picture accepted, in pixels: where Pillow, too, starts to refuse (512 MiB as RGB)."""
MAX_SIDE = 65_535
"""The longest side accepted, in pixels: the longest that JPEG can hold."""
ROUNDING = 1e-3
"""How far floats may lie outside 0..1 and are clipped: about half a level of 8 bits, so nothing visible."""

_BAND_PIXELS = 1 << 20
_Turn: TypeAlias = "Image.Transpose | None"
_FROM_THE_END = {Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM}
_FROM_THE_END |= {Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE}
_SIDEWAYS = {Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE}
_SIDEWAYS |= {Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270}


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises ImageError for a picture without pixels, and one of more than are accepted."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} is {width * height:,} pixels, at most {MAX_PIXELS:,}")
    if max(size) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height}, sides of at most {MAX_SIDE:,} pixels")


def bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    """The first row of each band of a picture, and the one behind its last."""
    n_rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, n_rows):
        yield top, min(top + n_rows, height)


def content_hash(image: Image.Image) -> bytes:
    """16 bytes (BLAKE2b) that name the content of an RGB picture: its size and its pixels."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    for top, bottom in bands(*image.size):
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.digest()


def to_rgb(image: Image.Image, background: Color, turn: _Turn = None, clear: Clear = None) -> Image.Image:
    """A new RGB picture of a decoded one, turned; where it is transparent it shows `background`.

    `clear` is what is transparent in a picture without an alpha channel, at the depth of its pixels.
    """
    is_wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
    white = _white(image) if is_wide else 0.0

    def band(top: int, bottom: int) -> Image.Image:
        part = image.crop((0, top, image.width, bottom))
        part.info = {} if clear is None else {"transparency": clear}
        part = _wide_grey(part, white, background) if is_wide else _over(part, background)
        return part if turn is None else part.transpose(turn)

    return _in_bands(image.size, band, turn)


def _in_bands(
    size: tuple[int, int], band: Callable[[int, int], Image.Image], turn: _Turn = None
) -> Image.Image:
    """The RGB picture of the parts that `band` makes of the rows from .. to of a picture of `size`."""
    width, height = size
    whole = (height, width) if turn in _SIDEWAYS else size
    picture = Image.new("RGB", whole, None)  # not filled: that would be a long step of its own
    for top, bottom in bands(width, height):
        place = height - bottom if turn in _FROM_THE_END else top
        picture.paste(band(top, bottom), (place, 0) if turn in _SIDEWAYS else (0, place))
    return picture


def _over(image: Image.Image, background: Color) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or image.mode == "RGBa" or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def with_clear(high: Image.Image, low: Image.Image, clear: tuple[int, ...]) -> Image.Image:
    """The RGBA picture of 16-bit colours, given as their upper and lower bytes, of which `clear` is transparent."""
    alpha = Image.new("L", high.size, 255)
    for top, bottom in bands(*high.size):
        box = (0, top, high.width, bottom)
        upper, lower = np.asarray(high.crop(box)), np.asarray(low.crop(box))
        is_clear = (upper == np.array(clear) >> 8).all(-1) & (lower == np.array(clear) & 255).all(-1)
        alpha.paste(Image.fromarray(np.where(is_clear, np.uint8(0), np.uint8(255))), (0, top))
    rgba = high.copy()
    rgba.info = {}
    rgba.putalpha(alpha)
    return rgba


def _white(image: Image.Image) -> float:
    """The value that is white in a picture of wide greys."""
    if image.mode.startswith("I;16"):
        return 65535.0
    parts = (np.asarray(image.crop((0, top, image.width, bottom))) for top, bottom in bands(*image.size))
    low, high = _range(parts)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError(f"grey values {low:g}..{high:g}, need finite ones from 0 up")
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    return next((white for white in whites if high <= white), high)


def _wide_grey(image: Image.Image, white: float, background: Color) -> Image.Image:
    values = np.asarray(image)
    grey = np.rint(values.astype(np.float64) * 255 / white).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        rgb.paste(background, mask=Image.fromarray((values == clear) * np.uint8(255)))
    return rgb


def _range(parts: Iterator[npt.NDArray[Any]]) -> tuple[float, float]:
    """The smallest and the largest value; NaN if one is."""
    lows, highs = zip(*((part.min(), part.max()) for part in parts), strict=True)
    return float(np.min(lows)), float(np.max(highs))


# --- arrays ---


def from_array(array: npt.NDArray[Any], background: Color, *, channels_first: bool = False) -> Image.Image:
    """The RGB picture in an array; `channels_first`: [3, H, W], too, is taken, where it means nothing else."""
    array = _as_rows(array, channels_first)
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_):
        raise TypeError(
            f"array of {str(array.dtype)[:100]}: need uint8, or floats in 0..1 (also uint16, and bool)"
        )
    height, width = array.shape[:2]
    check_size((width, height), "image array")
    if array.dtype.kind == "f":
        _check_floats(array)

    def band(top: int, bottom: int) -> Image.Image:
        return _over(Image.fromarray(np.ascontiguousarray(_levels(array[top:bottom]))), background)

    return _in_bands((width, height), band)


def _as_rows(array: npt.NDArray[Any], channels_first: bool) -> npt.NDArray[Any]:
    """[H, W] or [H, W, 3 or 4] of what stands for it."""
    shape = list(array.shape)
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    channels = (1, 3, 4)
    is_first = array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels
    if is_first and (channels_first or array.shape[0] == 1):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels):
        raise ImageError(
            f"array of shape {str(shape)[:100]}: need [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]{_hint(array)}"
        )
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _hint(array: npt.NDArray[Any]) -> str:
    if array.ndim == 4:
        return "; of several pictures, give each by itself"
    if array.ndim == 3 and array.shape[0] in (3, 4):
        return "; array.transpose(1, 2, 0) puts the channels last"
    return ""


def _check_floats(array: npt.NDArray[Any]) -> None:
    low, high = _range(array[top:bottom] for top, bottom in bands(array.shape[1], array.shape[0]))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN, too, ends here
        raise ImageError(f"float array with values {low:g}..{high:g}: need 0..1 (or uint8 for 0..255)")


def _levels(part: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """0..255 of any type that is taken."""
    if part.dtype == np.uint8:
        return part
    if part.dtype.kind == "u":
        part = part.astype(np.float64) * 255 / 65535
    elif part.dtype.kind == "f":
        part = np.clip(part, 0, 1) * 255.0
    else:
        part = part * 255.0
    levels: npt.NDArray[np.uint8] = np.rint(part).astype(np.uint8)
    return levels
