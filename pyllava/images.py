"""Pictures in, pixels out: decoded with Pillow, then cut, resized and normalised as LLaVA was trained.

LLaVA-1.5 sees a picture once, on a square ("pad"); LLaVA-1.6 sees it whole and in tiles ("anyres").
The models were trained on Pillow's bicubic, so Pillow does the resizing: the 8-bit pixels equal the
reference's to the bit.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeAlias

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


# --- decoding ---


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
        _check_size(source.size, "PIL image")
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
            _check_size(image.size, name)
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


def _check_size(size: tuple[int, int], name: str) -> None:
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
    _check_size((shape[1], shape[0]), "image array")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN, too, ends here
            raise ImageError(f"float array with values {low:g}..{high:g}: need 0..1 (or uint8 for 0..255)")
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), background)


# --- preprocessing ---


@dataclass(frozen=True)
class ImageSpec:
    """What a vision tower was trained on: pixels a side, and per channel the mean and std of value / 255."""

    image_size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    aspect: Literal["pad", "anyres"] = "pad"
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

    "pad" gives one view; "anyres" the whole picture, distorted to a square, and its tiles row by row.
    """
    if image.mode != "RGB":
        raise ValueError(f"picture of mode {image.mode}: need RGB, as load_image gives it")
    _check_size(image.size, "image")
    views = _VIEWS[spec.aspect](image, spec)
    pixels = np.stack([_normalised(view, spec) for view in views])
    return Views(pixels, image.size, tile_grid(image.size, spec))


def tile_grid(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(columns, rows) of the tiles that a picture of `size` = (width, height) is cut into; (0, 0) for none."""
    if spec.aspect != "anyres" or not spec.pinpoints:
        return 0, 0
    width, height = best_resolution(size, spec.pinpoints)
    return width // spec.image_size, height // spec.image_size


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


def anyres(image: Image.Image, spec: ImageSpec) -> list[Image.Image]:
    """LLaVA-1.6: the picture distorted to a square, then the tiles of it, u8 [S, S, 3] each.

    For the tiles it is resized into the best of `spec.pinpoints`, its shape kept, and centred on black.
    Without pinpoints there is the first view alone.
    """
    side = spec.image_size
    views = [image.resize((side, side), Image.Resampling.BICUBIC)]
    if not spec.pinpoints:
        return views
    resolution = best_resolution(image.size, spec.pinpoints)
    canvas = Image.new("RGB", resolution)
    inside = image.resize(_fitted(image.size, resolution), Image.Resampling.BICUBIC)
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


_VIEWS: dict[str, Callable[[Image.Image, ImageSpec], list[Image.Image]]] = {"pad": pad, "anyres": anyres}
_BAND_PIXELS = 1 << 20
_SLENDER = 8  # from this height : width on, most of the square is border: skipping it is faster than Pillow
_FIXED_POINT = 22  # Pillow's weights for 8-bit pictures are integers of 1 / 2^22


def _narrowed(rows: Image.Image, size: int) -> Image.Image:
    return rows.resize((size, rows.height), Image.Resampling.BICUBIC)


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
