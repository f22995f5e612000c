"""What a file of a picture is, by its first bytes; Pillow is loaded for a file that is one, not before."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import ImageFile

MAX_BYTES = 1 << 30
"""The largest file read into memory, in bytes: more than the largest picture takes without compression."""
_FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
HEAD_BYTES = 256
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_NAMED: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"%pdf", "a PDF document: give a picture of the page"),
    ((b"%!ps", b"\xc5\xd0\xd3\xc6"), "a PostScript document: give a picture of the page"),
    ((b"<!doctype html", b"<html"), "a web page: give the picture that it shows"),
    (b"<?xml", "an XML document (of an SVG drawing: render it to a PNG first)"),
    (b"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches the picture"),
    (b"data:", "the text of a data: URL: give the text itself"),
    ((b"/9j/", b"ivborw0kggo"), "base64 text: decode it, or put 'data:image/...;base64,' before it"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL picture: convert it"),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "a JPEG 2000 picture: convert it"),
    (b"GGUF", "a GGUF model: -m names it, or model= in Python"),
    (b"8BPS", "a Photoshop document: export it as PNG"),
    (b"\0\0\1\0", "an icon: convert it"),
    (b"PK\3\4", "a zip archive: unpack it"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
)


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
    return _of_container(head)


def _of_container(head: bytes) -> type[ImageFile.ImageFile] | None:
    """The plugin for AVIF, or HEIC, where one is installed that can."""
    brands = _brands(head)
    if brands & _AVIF:
        with contextlib.suppress(ImportError):
            from PIL import AvifImagePlugin  # of Pillow 11.3 and later

            return AvifImagePlugin.AvifImageFile if AvifImagePlugin.SUPPORTED else None
    elif brands & _HEIC:
        with contextlib.suppress(ImportError):
            heif = importlib.import_module("pillow_heif")
            plugin: type[ImageFile.ImageFile] = heif.HeifImageFile
            return plugin
    return None


def _brands(head: bytes) -> set[bytes]:
    """What an ISO media file says it is: AVIF and HEIC are such files, and so are videos."""
    if head[4:8] != b"ftyp":
        return set()
    box = head[8 : max(16, int.from_bytes(head[:4], "big"))]
    return {box[at : at + 4] for at in range(0, len(box) - 3, 4) if at != 4}


def _not_read(head: bytes) -> str:
    """Of a file that is none of _FORMATS, what it is and what to give instead; "" if that is unknown."""
    brands = _brands(head)
    if brands & _AVIF:
        return "an AVIF picture, which this Pillow cannot read: install Pillow 11.3 or newer, or convert it"
    if brands & _HEIC:
        return 'a HEIC picture: pip install "pyllava[heif]", or convert it'
    if brands:
        return "a video: give one of its frames"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing: render it to a PNG first"
    return next((what for marks, what in _NAMED if text.startswith(marks) or head.startswith(marks)), "")


def is_picture(data: bytes) -> bool:
    """Whether the bytes begin as a picture does that can be read."""
    return _decoder(data[:HEAD_BYTES]) is not None


def check_head(head: bytes, name: str) -> type[ImageFile.ImageFile]:
    """The plugin for a file that starts with `head`. Raises ImageError if there is none."""
    if not head:
        raise ImageError(f"{name}: empty")
    plugin = _decoder(head)
    if plugin is None:
        what = _not_read(head)
        raise ImageError(f"{name}: not a {_FORMATS} image{what and f' but {what}'}")
    return plugin
