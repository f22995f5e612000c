"""Pictures as the vision tower takes them: cut, resized and normalised as LLaVA was trained.

LLaVA-1.5 sees a picture once, on a square ("pad"); models with SigLIP as its processor makes it, without its
shape ("squash"); LLaVA-1.6 sees it whole and in tiles ("anyres"). The models were trained on Pillow's bicubic, so Pillow does the resizing: the 8-bit pixels equal the
reference's to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._leaving import leavable
from ._pixels import Color, bands, check_size


@dataclass(frozen=True)
class ImageSpec:
    """What a vision tower was trained on: pixels a side, and per channel the mean and std of value / 255."""

    image_size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    aspect: Literal["pad", "squash", "anyres"] = "pad"
    pinpoints: tuple[tuple[int, int], ...] = ()
    """For "anyres", the resolutions (width, height) to choose from: multiples of `image_size`."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"{self}: need a positive size, three means and three positive deviations")
        for side in itertools.chain.from_iterable(self.pinpoints):
            if side < 1 or side % self.image_size:
                raise ValueError(f"pinpoints {self.pinpoints}: need positive multiples of {self.image_size}")

    @property
    def pad_color(self) -> Color:
        """The colour of LLaVA's borders: the mean, truncated, not rounded; (122, 116, 104) for CLIP."""
        red, green, blue = (min(max(int(mean * 255), 0), 255) for mean in self.mean)
        return red, green, blue


@dataclass(frozen=True, eq=False)
class Views:
    """One picture as the vision tower takes it."""

    pixels: npt.NDArray[np.float32]
    """float32 [n_views, 3, S, S], C-contiguous, normalised."""
    size: tuple[int, int]
    """(width, height) of the picture, in pixels."""
    grid: tuple[int, int] = (0, 0)
    """(columns, rows) of the tiles that follow the first view; (0, 0) for none."""


def preprocess(image: Image.Image, spec: ImageSpec) -> Views:
    """Turn an RGB picture (see `load_image`) into what the vision tower of `spec` takes.

    "pad" and "squash" give one view; "anyres" the whole picture, distorted to a square, and its tiles row by row.
    """
    if image.mode != "RGB":
        raise ValueError(f"picture of mode {image.mode}: need RGB, as load_image gives it")
    check_size(image.size, "image")
    views = _VIEWS[spec.aspect](image, spec)
    pixels = np.stack([_normalised(view, spec) for view in views])
    return Views(pixels, image.size, tile_grid(image.size, spec))


def tile_grid(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(columns, rows) of the tiles that a picture of `size` = (width, height) is cut into; (0, 0) for none."""
    if spec.aspect != "anyres" or not spec.pinpoints:
        return 0, 0
    width, height = best_resolution(size, spec.pinpoints)
    return width // spec.image_size, height // spec.image_size


def frames(size: tuple[int, int], spec: ImageSpec) -> list[tuple[float, float, float, float]]:
    """Where a picture of `size` lies in the first view and, if it is cut into tiles, on the canvas of all tiles.

    Boxes (left, top, right, bottom) as shares of the view's, or the canvas's, width and height.
    """
    whole = (0.0, 0.0, 1.0, 1.0)
    if spec.aspect == "pad":
        return [_framed(size, (max(size),) * 2)]
    if tile_grid(size, spec) == (0, 0):
        return [whole]
    canvas = best_resolution(size, spec.pinpoints)
    return [whole, _framed(_fitted(size, canvas), canvas)]


def _framed(inside: tuple[int, int], canvas: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of what is pasted into the middle, as `pad` and `anyres` do."""
    left, top = ((outer - inner) // 2 for outer, inner in zip(canvas, inside, strict=True))
    width, height = canvas
    return left / width, top / height, (left + inside[0]) / width, (top + inside[1]) / height


def best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `resolutions` (width, height) that keeps most of a picture of `size` = (width, height).

    It is the one with the most pixels of the picture, then the one with the least area unused, then the
    first (LLaVA-NeXT's select_best_resolution, in the same double precision).
    """
    width, height = size

    def worth(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - resolution[0] * resolution[1]

    return max(resolutions, key=worth)


def squash(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """SigLIP's processor: the picture distorted to a square, u8 [S, S, 3]."""
    return [_resized(image, (spec.image_size,) * 2)]


def anyres(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """LLaVA-1.6: the picture distorted to a square, then the tiles of it, u8 [S, S, 3] each.

    For the tiles it is resized into the best of `spec.pinpoints`, its shape kept, and centred on black.
    Without pinpoints there is the first view alone.
    """
    side = spec.image_size
    views = squash(image, spec)
    if not spec.pinpoints:
        return views
    resolution = best_resolution(image.size, spec.pinpoints)
    canvas = Image.new("RGB", resolution)
    inside = _resized(image, _fitted(image.size, resolution))
    canvas.paste(inside, ((canvas.width - inside.width) // 2, (canvas.height - inside.height) // 2))
    for y in range(0, canvas.height, side):
        views += [canvas.crop((x, y, x + side, y + side)) for x in range(0, canvas.width, side)]
    return views


def _fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """`size` scaled so that it just fits in `box`, the shorter side rounded up."""
    (width, height), (scale_x, scale_y) = size, (box[0] / size[0], box[1] / size[1])
    if scale_x < scale_y:
        return box[0], min(math.ceil(height * scale_x), box[1])
    return min(math.ceil(width * scale_y), box[0]), box[1]


def pad(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """LLaVA-1.5: the picture centred on a square of the mean colour, then resized: one view, u8 [S, S, 3].

    The square, as long a side as the picture's longer one, is never built. Pillow resizes in two passes, rows
    first, each rounded to 8 bits, so the rows can be narrowed apart and only a strip [longer side, S] is
    kept; the bytes are the same.
    """
    size, side = spec.image_size, max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    strip = Image.new("RGB", (size, side), spec.pad_color)  # a row of one colour keeps it when resized
    if left == 0 and image.width == side:
        strip.paste(_narrowed(image, size), (0, top))
    elif image.width * _SLENDER <= side:
        strip.paste(Image.fromarray(_narrowed_slender(image, spec)), (0, 0))
    else:
        band = max(1, _BAND_PIXELS // side)
        for y in range(0, side, band):
            rows = Image.new("RGB", (side, min(band, side - y)), spec.pad_color)
            rows.paste(image.crop((0, y, image.width, y + rows.height)), (left, 0))
            strip.paste(_narrowed(rows, size), (0, y))
    return [strip.resize((size, size), Image.Resampling.BICUBIC)]


_VIEWS: dict[str, Callable[[Image.Image, ImageSpec], list[Image.Image]]] = {
    "pad": pad,
    "squash": squash,
    "anyres": anyres,
}
_BAND_PIXELS = 1 << 20
_LONG = 1 << 23  # pixels from which on one call to resize a picture may take a tenth of a second
_SLENDER = 8  # from this height : width on, most of the square is border: skipping it is faster than Pillow
_FIXED_POINT = 22  # Pillow's weights for 8-bit pictures are integers of 1 / 2^22


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """In one call: whether Pillow takes rows or columns first, which changes the bytes, depends on its version."""
    if image.width * image.height < _LONG:
        return image.resize(size, Image.Resampling.BICUBIC)
    return leavable(lambda: image.resize(size, Image.Resampling.BICUBIC))


def _narrowed(rows: Image.Image, size: int) -> Image.Image:
    """The first pass, of which each row is by itself: of a large picture in bands, so that Ctrl-C works between."""
    if rows.width * rows.height <= _BAND_PIXELS:
        return rows.resize((size, rows.height), Image.Resampling.BICUBIC)
    narrow = Image.new("RGB", (size, rows.height))
    for top, bottom in bands(*rows.size):
        part = rows.crop((0, top, rows.width, bottom))
        narrow.paste(part.resize((size, bottom - top), Image.Resampling.BICUBIC), (0, top))
    return narrow


def _narrowed_slender(image: Image.Image, spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """`_narrowed` of a slender picture on its square, u8 [side, S, 3]: the borders are a sum of weights."""
    size, side = spec.image_size, image.height
    left = (side - image.width) // 2
    border = np.array(spec.pad_color, np.int64)
    picture = np.asarray(image)
    strip = np.empty((side, size, 3), np.uint8)
    strip[:] = border
    for x in range(size):
        first, weights = _bicubic_weights(x, side, size)
        begin, end = max(first, left), min(first + len(weights), left + image.width)
        if begin >= end:
            continue
        inside = weights[begin - first : end - first]
        sums = border * (weights.sum() - inside.sum())
        sums = sums + np.einsum("ywc,w->yc", picture[:, begin - left : end - left], inside)
        strip[:, x] = np.clip((sums + (1 << (_FIXED_POINT - 1))) >> _FIXED_POINT, 0, 255)
    return strip


def _bicubic_weights(x: int, length: int, size: int) -> tuple[int, npt.NDArray[np.int64]]:
    """What output pixel `x` of `size` reads of a row of `length`: its first pixel, Pillow's integer weights.

    Keys' cubic with a = -1/2, widened by the reduction factor, centred on (x + 1/2) length / size, normalised
    to one.
    """
    factor = length / size
    reach = max(factor, 1.0)
    center = (x + 0.5) * factor
    first = max(int(center - 2 * reach + 0.5), 0)
    last = min(int(center + 2 * reach + 0.5), length)
    t = np.abs((np.arange(first, last) - center + 0.5) * (1 / reach))
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    weights *= 1 / weights.sum()
    fixed = weights * (1 << _FIXED_POINT)
    return first, np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64)


def _normalised(view: Image.Image, spec: ImageSpec) -> npt.NDArray[np.float32]:
    levels = np.arange(256) / 255.0
    channels = np.asarray(view).transpose(2, 0, 1)
    normalised = np.empty(channels.shape, np.float32)
    for channel, out, mean, std in zip(channels, normalised, spec.mean, spec.std, strict=True):
        out[:] = ((levels - mean) / std).astype(np.float32)[channel]
    return normalised
