"""Pictures: every kind decodes to what it shows or fails with one line; pixels equal the reference's."""

from __future__ import annotations

import array as machine_arrays
import base64
import contextlib
import io
import json
import mmap
import os
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pyllava import _picture_files, _pixels, _sources
from pyllava import views as views_module
from pyllava._leaving import leavable
from pyllava.errors import ImageError, PyllavaError
from pyllava.images import content_hash, decode_data_url, load_image, open_source
from pyllava.views import ImageSpec, pad, preprocess

GOLDEN_SCRIPT = Path(__file__).parent / "data/images/make_goldens.py"
G = runpy.run_path(str(GOLDEN_SCRIPT))
drawn, on_square = G["drawn"], G["on_square"]

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(
    width: int, height: int, depth: int, color_type: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG written by hand: kinds that Pillow cannot write, headers that promise too much."""
    head = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def first_pixel(source: Any, **options: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in pixels(load_image(source, **options))[0, 0])


# --- sources and formats ---


@pytest.mark.parametrize("format", FORMATS)
def test_formats_from_path_bytes_and_data_url(tmp_path: Path, format: str) -> None:
    data = saved(drawn(31, 17), format)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    path = tmp_path / "picture.without-a-telling-name"
    path.write_bytes(data)
    url = f"data:image/x;base64,{base64.b64encode(data).decode()}"
    for source in (path, str(path), data, bytearray(data), memoryview(data), url):
        assert np.array_equal(pixels(load_image(source)), expected)


def test_pil_image_is_not_changed() -> None:
    picture = drawn(9, 5)
    before = picture.copy()
    loaded = load_image(picture)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert picture == before


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert first_pixel(data) == RED


def test_wrong_type() -> None:
    for source in (None, 7, [1, 2], object()):
        with pytest.raises(TypeError, match="need a path, bytes, a PIL image or a NumPy array"):
            load_image(source)  # type: ignore[arg-type]


# --- modes ---


def test_grey_palette_and_bits() -> None:
    grey = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
    three = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(load_image(saved(Image.fromarray(grey)))), three)
    assert np.array_equal(pixels(load_image(saved(Image.fromarray(grey), "TIFF"))), three)
    bits = Image.fromarray(grey > 120)
    assert bits.mode == "1"
    for format in ("PNG", "TIFF", "BMP", "GIF"):
        assert np.array_equal(pixels(load_image(saved(bits, format))), (three > 120) * np.uint8(255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(load_image(saved(palette))).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0, (255, 255, 255)), (255, (200, 100, 0)), (128, (227, 177, 127))]
)
def test_alpha_over_white(alpha: int, expected: tuple[int, int, int]) -> None:
    picture = Image.new("RGBA", (3, 2), (200, 100, 0, alpha))
    for source in (picture, saved(picture), saved(picture, "TIFF"), np.asarray(picture)):
        assert np.allclose(first_pixel(source), expected, atol=1)
    grey = Image.new("LA", (3, 2), (200, alpha))
    assert np.allclose(first_pixel(saved(grey)), [255 + (200 - 255) * alpha / 255] * 3, atol=1)
    assert np.allclose(first_pixel(picture.convert("RGBa")), expected, atol=2)


def test_background() -> None:
    assert first_pixel(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), background=BLUE) == BLUE


def test_palette_with_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        data = saved(palette, format, transparency=0)
        assert pixels(load_image(data)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    half = saved(palette, "PNG", transparency=bytes([255, 0]))
    assert pixels(load_image(half)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_one_transparent_colour() -> None:
    rgb = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", bytes([0, 1, 0, 2, 0, 3])))
    assert pixels(load_image(rgb)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("bright", [False, True])
def test_one_transparent_grey_of_any_depth(depth: int, bright: bool) -> None:
    """Black, or white, is transparent; the other one stays, on a background that is neither."""
    black_white = {1: b"\x40", 2: b"\x30", 4: b"\x0f", 8: b"\0\xff", 16: b"\0\0\xff\xff"}[depth]
    clear = struct.pack(">H", (1 << depth) - 1 if bright else 0)
    data = png(2, 1, depth, 0, b"\0" + black_white, (b"tRNS", clear))
    expected = [[[0, 0, 0], list(BLUE)]] if bright else [[list(BLUE), [255, 255, 255]]]
    assert pixels(load_image(data, background=BLUE)).tolist() == expected
    with Image.open(io.BytesIO(data)) as image:
        before = dict(image.info)
        assert pixels(load_image(image, background=BLUE)).tolist() == expected
        assert image.info == before


def test_a_transparent_grey_is_one_of_65536() -> None:
    data = png(3, 1, 16, 0, b"\0" + struct.pack(">HHH", 999, 1000, 1001), (b"tRNS", struct.pack(">H", 1000)))
    assert pixels(load_image(data, background=RED)).tolist() == [[[4] * 3, list(RED), [4] * 3]]


def test_a_transparent_16_bit_colour_is_that_colour_alone() -> None:
    near = [(0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD), (0x1235, 0x5678, 0x9ABC), (0, 0, 0)]
    rows = b"\0" + b"".join(struct.pack(">HHH", *color) for color in near)
    exif = Image.Exif()
    exif[0x0112] = 2
    chunks = (b"tRNS", struct.pack(">HHH", *near[0])), (b"eXIf", exif.tobytes()[6:])
    expected = [[0] * 3, [0x12, 0x56, 0x9A], [0x12, 0x56, 0x9A], list(BLUE)]
    data = png(4, 1, 16, 2, rows, *chunks)
    assert pixels(load_image(data, background=BLUE)).tolist() == [expected]
    with Image.open(io.BytesIO(data)) as image:
        assert pixels(load_image(image, background=BLUE)).tolist() == [expected]


def test_16_bit_grey_with_an_alpha_channel() -> None:
    data = png(3, 1, 16, 4, b"\0" + struct.pack(">6H", 0, 0, 65535, 65535, 0, 32768))
    assert pixels(load_image(data))[0, :, 0].tolist() == [255, 255, 127]


@pytest.mark.parametrize(
    "mode", ["LA", "La", "PA", "RGBA", "RGBa", "P", "L", "1", "RGB", "I", "F", "I;16", "I;16B"]
)
def test_transparency_of_every_mode(mode: str) -> None:
    """The whole picture is transparent: nothing of it but the background is seen."""
    if "A" in mode.upper():
        picture = (
            Image.new("RGBA", (3, 2), (9, 9, 9, 0)).convert({"La": "LA"}.get(mode, "RGBA")).convert(mode)
        )
    else:
        picture = Image.new(mode, (3, 2))
        picture.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    assert (pixels(load_image(picture, background=BLUE)) == BLUE).all()


def test_cmyk_and_ycck_as_pillow_converts_them() -> None:
    cmyk = drawn(24, 16).convert("CMYK")
    jpeg = saved(cmyk, "JPEG", quality=95)
    adobe = jpeg.index(b"Adobe")
    ycck = jpeg[: adobe + 11] + b"\x02" + jpeg[adobe + 12 :]
    assert ycck != jpeg
    for data in (jpeg, ycck, saved(cmyk, "TIFF")):
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "CMYK"
            assert np.array_equal(pixels(load_image(data)), np.asarray(image.convert("RGB")))
    assert np.abs(pixels(load_image(jpeg)).astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 20


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 257, 1000, 32896, 65535]], np.uint16)
    expected = [0, 1, 1, 4, 128, 255]
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    for source in (picture, saved(picture), saved(picture, "TIFF"), Image.fromarray(values.astype(np.int32))):
        assert pixels(load_image(source))[0, :, 0].tolist() == expected
    big_endian = Image.frombytes("I;16B", picture.size, values.astype(">u2").tobytes())
    assert pixels(load_image(big_endian))[0, :, 0].tolist() == expected


def test_16_bit_colour() -> None:
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 0))
    assert first_pixel(data) == (255, 128, 0)
    data = png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", 65535, 32896, 0, 0))
    assert first_pixel(data) == WHITE


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_float_tiff(white: float) -> None:
    values = (np.array([[0, 0.25, 0.5, 1]]) * white).astype(np.float32)
    data = saved(Image.fromarray(values), "TIFF")
    assert pixels(load_image(data))[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_float_tiff_without_a_meaning(value: float) -> None:
    data = saved(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    with pytest.raises(ImageError, match=r"TIFF image: grey values .* need finite ones from 0 up"):
        load_image(data)


def test_32_bit_integers() -> None:
    values = np.array([[0, 500_000, 1_000_000]], np.int32)
    assert pixels(load_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]


# --- EXIF ---


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format: str, orientation: int) -> None:
    upright = np.kron(
        np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[0, 0, 0], [250] * 3, [120] * 3]]),
        np.ones((16, 16, 1)),
    )
    stored = {  # the rows and columns of the file for an upright picture: what the EXIF standard defines
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = saved(Image.fromarray(stored.astype(np.uint8)), format, exif=exif, **options)
    loaded = pixels(load_image(data))
    assert loaded.shape == upright.shape
    assert np.abs(loaded - upright).max() <= 12
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels(load_image(image)), loaded)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(saved(drawn(4, 3), exif=exif)) == load_image(saved(drawn(4, 3)))


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 99]
)
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
def test_broken_exif_is_ignored(exif: bytes) -> None:
    plain = saved(drawn(16, 8), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert load_image(plain[:2] + segment + plain[2:]) == load_image(plain)


# --- what is refused ---

NONE = "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"x", "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (b"just some text, long enough", "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (b"<!doctype html><html></html>", f"{NONE} but a web page: give the picture that it shows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", f"{NONE} but a PostScript document: give a picture of the page"),
        (b"%PDF-1.7\n", f"{NONE} but a PDF document: give a picture of the page"),
        (b" \n<svg xmlns='x'/>", f"{NONE} but an SVG drawing: render it to a PNG first"),
        (
            b"<?xml version='1.0'?>\n<!-- by hand -->\n<svg/>",
            f"{NONE} but an SVG drawing: render it to a PNG first",
        ),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isom", f"{NONE} but a video: give one of its frames"),
        (b"\xff\x0a\xfa\x1f", f"{NONE} but a JPEG XL picture: convert it"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            f"{NONE} but a Git LFS pointer: `git lfs pull` fetches the picture",
        ),
    ],
)
def test_not_an_image(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert str(caught.value) == f"{path}: {message}"
    assert isinstance(caught.value, PyllavaError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ImageError, match=message):
        load_image(data)


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PDF", "EPS"])
def test_formats_that_are_not_offered(format: str) -> None:
    with pytest.raises(ImageError):
        load_image(saved(drawn(16, 16), format))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_cut_at_every_byte(format: str, options: dict[str, Any]) -> None:
    """A cut picture is refused, or has lost nothing that is seen."""
    data = saved(drawn(20, 19), format, **options)
    whole = load_image(data)
    marks = {"JPEG": 2, "GIF": 2, "PNG": 12}.get(format, 0)  # bytes behind the pixels
    sums = 12 if format == "PNG" else 0  # of which the last bits of the stream may say nothing
    for n_bytes in range(len(data)):
        if n_bytes < len(data) - marks - sums:
            with pytest.raises(ImageError):
                load_image(data[:n_bytes])
        else:
            with (
                contextlib.nullcontext() if n_bytes >= len(data) - marks else contextlib.suppress(ImageError)
            ):
                assert load_image(data[:n_bytes]) == whole


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 16), (17, 33), (64, 40)])
@pytest.mark.parametrize("kind", ["drawn", "flat", "noise", "grey"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"quality": 100, "subsampling": 0},
        {"restart_marker_blocks": 1},
        {"quality": 5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_cut_jpeg_is_whole_or_refused(size: tuple[int, int], kind: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = {"drawn": drawn(*size), "flat": Image.new("RGB", size, RED), "noise": Image.fromarray(noise)}
    data = saved(picture.get(kind, drawn(*size).convert("L")), "JPEG", **options)
    whole = load_image(data)
    for n_bytes in range(max(0, len(data) - 60), len(data)):
        for cut in (data[:n_bytes], data[:n_bytes] + b"\xff"):
            try:
                shown = load_image(cut)
            except ImageError:
                assert n_bytes < len(data) - 2
            else:
                assert shown == whole
    for junk in (b"\0\0", b"\r\n", b"<html>"):
        assert load_image(data[:-2] + junk) == whole


@pytest.mark.parametrize("size", [(64, 48), (96, 80)])
@pytest.mark.parametrize("kind", ["drawn", "noise", "grey"])
@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_blocks": 1}, {"quality": 100, "subsampling": 0}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_end_behind_missing_pixels(size: tuple[int, int], kind: str, options: dict[str, Any]) -> None:
    """As some tools mend a file that was cut. Decoders fill such a picture up without a word."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = {"drawn": drawn(*size), "noise": Image.fromarray(noise)}.get(kind, drawn(*size).convert("L"))
    data = saved(picture, "JPEG", **options)
    whole, refused = load_image(data), 0
    begin = data.index(b"\xff\xda") + 14
    for n_bytes in np.linspace(begin, len(data) - 3, 40).astype(int):
        cut = data[:n_bytes] + b"\xff\xd9"
        try:
            shown = load_image(cut)
        except ImageError:
            refused += 1
            with pytest.raises(ImageError, match="before its last pixel"):
                load_image(cut)
            assert load_image(cut, on_truncated="pad").size == size
        else:  # what is left of the last block's colours is not told from a picture
            differs = (pixels(shown) != pixels(whole)).any(axis=2)
            assert not differs[:-24, :].any()
            assert differs.mean() < 0.2
    assert refused > 30


def test_a_flat_jpeg_is_no_cut_one() -> None:
    for size in ((1, 1), (3, 9), (16, 16), (400, 300)):
        for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}, {"quality": 100}):
            data = saved(Image.new("RGB", size, RED), "JPEG", **options)
            assert load_image(data).size == size
            assert load_image(data + b"behind it").size == size


def test_a_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = saved(drawn(64, 48), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    while (scan := data.find(b"\xff\xda", scan + 1)) > 0:
        with pytest.raises(ImageError, match="before its last pixel"):
            load_image(data[:scan])
        assert load_image(data[:scan], on_truncated="pad").size == (64, 48)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_missing_pixels_are_filled_on_demand(format: str) -> None:
    picture = drawn(300, 200)
    data = saved(picture, format)
    cut = data[: len(data) * 3 // 4]
    if format == "TIFF":
        assert data.index(b"\x00\x01", 8) < 300  # the directory comes before the pixels
    with pytest.raises(ImageError):
        load_image(cut)
    whole, shown = pixels(load_image(data)), pixels(load_image(cut, on_truncated="pad"))
    known = slice(-40, None) if format == "BMP" else slice(40)  # a BMP begins at the bottom
    assert shown.shape == whole.shape
    assert np.array_equal(shown[known], whole[known])
    assert not np.array_equal(shown, whole)
    with pytest.raises(ImageError):
        load_image(data[:12], on_truncated="pad")


def test_on_truncated_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="on_truncated='fill': need 'error' or 'pad'"):
        load_image(saved(drawn(3, 3)), on_truncated="fill")  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 10_000), st.integers(0, 255))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_byte_is_an_image_or_an_image_error(format: str, where: int, value: int) -> None:
    data = bytearray(saved(drawn(12, 10), format))
    data[where % len(data)] = value
    with contextlib.suppress(ImageError):
        assert load_image(bytes(data)).mode == "RGB"


def test_bad_checksum() -> None:
    data = bytearray(saved(drawn(12, 10)))
    data[data.index(b"IDAT") + 6] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        load_image(bytes(data))


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 20_000), (10_000_000, 10_000_000), (2**31 - 1, 1), (70_000, 1)]
)
def test_too_large_is_refused_from_the_header(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            load_image(png(width, height, 1, 0, b""))
    assert f"{width} x {height}" in str(caught.value)
    assert "178,956,970" in str(caught.value) or "65,535" in str(caught.value)


def test_large_picture_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="damaged"):  # 100 Mpx are allowed, but there are no rows
            load_image(png(10_000, 10_000, 1, 0, b""))


def test_zlib_bomb_in_a_text_chunk() -> None:
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    with pytest.raises(ImageError):
        load_image(png(1, 1, 8, 0, b"\0\0", bomb))


def test_ten_thousand_scans() -> None:
    data = saved(drawn(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 10_000 + data[-2:]
    with pytest.raises(ImageError, match=r"JPEG of 10,\d\d\d scans, at most 100"):
        load_image(bomb)
    noise = b"\xff\xe5\x10\x02" + b"\xff\xda" * 0x800  # the same bytes, but only metadata
    assert load_image(data[:2] + noise + data[2:]) == load_image(data)


@pytest.mark.parametrize(
    ("marker", "head"),
    [
        (0xE0, b"JFIF\0"),
        (0xE1, b"Exif\0\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\0"),
        (0xFE, b""),
    ],
)
def test_a_hundred_megabytes_of_metadata(marker: int, head: bytes) -> None:
    """Pillow joins EXIF segments in quadratic time: it is given a million bytes of them."""
    data = saved(drawn(37, 53), "JPEG")
    segment = bytes([0xFF, marker]) + struct.pack(">H", 65535) + head.ljust(65533, b"\0")
    began = time.monotonic()
    assert load_image(data[:2] + segment * 1600 + data[2:]) == load_image(data)
    assert time.monotonic() - began < 5  # 0.3 s; it took more than a minute


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_metadata_beyond_the_limit_change_no_pixel(mode: str) -> None:
    """Colours and orientation are told by segments, too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(drawn(24, 16).convert(mode), "JPEG", exif=exif)
    comment = b"\xff\xfe" + struct.pack(">H", 65535) + bytes(65533)
    behind = data.index(b"\xff\xdb")  # the tables, which follow the metadata
    assert load_image(data[:behind] + comment * 20 + data[behind:]) == load_image(data)
    filled = data[:behind] + b"\xff" * 2_000_000 + data[behind:]
    assert load_image(filled) == load_image(data)


def test_too_many_segments() -> None:
    data = saved(drawn(24, 16), "JPEG")
    with pytest.raises(ImageError, match="JPEG of more than 65,536 segments before its pixels"):
        load_image(data[:2] + b"\xff\xfe\0\2" * 1_000_000 + data[2:])


def test_too_many_chunks() -> None:
    data = saved(drawn(24, 16))
    chunk = b"\0\0\0\0prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    assert load_image(data[:33] + chunk * 1000 + data[33:]) == drawn(24, 16)
    with pytest.raises(ImageError, match="PNG of more than 65,536 chunks besides its pixels"):
        load_image(data[:33] + chunk * 2_000_000 + data[33:])


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="a folder, not an image file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="null byte"):
        load_image("a\0b.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_fifo_and_device_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "WAIT_FOR_WRITER", 0.1)
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    with pytest.raises(ImageError, match="a pipe into which nobody writes"):
        load_image(fifo)
    with pytest.raises(ImageError, match="/dev/zero: not a JPEG"):
        load_image("/dev/zero")
    with pytest.raises(ImageError, match="/dev/null: empty"):
        load_image("/dev/null")
    master, terminal = os.openpty()
    with pytest.raises(ImageError, match="a terminal, not an image file"):
        load_image(os.ttyname(terminal))
    os.close(master)
    os.close(terminal)


# --- sources ---


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_named_pipe(tmp_path: Path) -> None:
    """Written late, slowly, and by a writer that is gone before the pipe is read."""
    data = saved(drawn(200, 100), "BMP")  # more than a pipe holds
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def write() -> None:
        time.sleep(0.1)
        with open(fifo, "wb", buffering=0) as file:
            file.write(data[:10])
            time.sleep(0.1)
            for at in range(10, len(data), 9999):
                file.write(data[at : at + 9999])

    thread = threading.Thread(target=write)
    thread.start()
    assert load_image(fifo) == drawn(200, 100)
    thread.join()


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs /dev/fd")
def test_process_substitution() -> None:
    reading, writing = os.pipe()
    os.write(writing, saved(drawn(9, 5)))
    os.close(writing)
    assert load_image(f"/dev/fd/{reading}") == drawn(9, 5)
    os.close(reading)


def test_endless_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "MAX_BYTES", 5_000_000)

    class Endless:
        def read(self, n_bytes: int = -1) -> bytes:
            return saved(drawn(3, 3)).ljust(n_bytes, b"\0")

    with pytest.raises(ImageError, match="image file: more than 5,000,000 bytes"):
        load_image(Endless())


def test_home_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "a b#1?%41 é.png"
    drawn(4, 3).save(path)
    urls = [
        path.as_uri(),
        path.as_uri().replace("file:///", "FILE://localhost/"),
        path.as_uri().replace(":///", ":/"),
    ]
    for source in (f"~/{path.name}", Path("~") / path.name, *urls):
        assert load_image(source) == drawn(4, 3)
        if isinstance(source, str):
            assert load_image(open_source(source)) == drawn(4, 3)
    monkeypatch.chdir(tmp_path)
    os.rename(path, "~")  # a file of that name goes first
    assert load_image("~") == drawn(4, 3)
    with pytest.raises(ImageError, match="on another computer"):
        load_image("file://server/share/a.png")


class Upload:
    """As web frameworks give one: it can read, and that is all."""

    filename = "cat.png"

    def __init__(self, data: bytes, piece: int = 1 << 30) -> None:
        self.data, self.piece = io.BytesIO(data), piece

    def read(self, n_bytes: int = -1) -> bytes:
        return self.data.read(min(n_bytes, self.piece))


def test_file_objects(tmp_path: Path) -> None:
    picture = drawn(40, 30)
    data = saved(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    written = io.BytesIO()
    picture.save(written, "PNG")  # and left at its end
    with (
        open(path, "rb") as file,
        open(path, "rb", buffering=0) as raw,
        tempfile.SpooledTemporaryFile() as spooled,
    ):
        spooled.write(data)
        for source in (file, raw, written, spooled, Upload(data), Upload(data, 7), io.BufferedReader(raw)):
            assert load_image(source) == picture
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert load_image(mapped) == picture
    assert load_image(machine_arrays.array("B", data)) == picture
    assert load_image(memoryview(data + data)[: len(data)]) == picture
    assert load_image(memoryview(data[::-1])[::-1]) == picture
    with (
        open(path, encoding="latin-1") as text,
        pytest.raises(TypeError, match=r"gives str, need bytes.*'rb'"),
    ):
        load_image(text)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"a.png: .*closed file"):
        load_image(file)
    with pytest.raises(ImageError, match=r"cat.png: not a JPEG"):
        load_image(Upload(b"x" * 1000))
    with pytest.raises(ImageError, match=r"cat.png: empty"):
        load_image(Upload(b""))


def test_asynchronous_upload() -> None:
    class Later:
        async def read(self, n_bytes: int = -1) -> bytes:
            return b""

    with pytest.raises(TypeError, match="asynchronous: give the bytes"):
        load_image(Later())  # type: ignore[arg-type]


class Tensor:
    """What torch.Tensor is to NumPy: on a device and in a graph it gives no array."""

    def __init__(self, array: np.ndarray, where: str = "graph") -> None:
        self.array, self.where = array, where

    def detach(self) -> Tensor:
        return Tensor(self.array, "device")

    def cpu(self) -> Tensor:
        assert self.where == "device"
        return Tensor(self.array, "memory")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.where != "memory":
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.array.dtype == np.complex64:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


def test_tensors() -> None:
    rgb = np.asarray(drawn(7, 5))
    floats = (rgb / 255).astype(np.float32)
    first = rgb.transpose(2, 0, 1)
    for array in (rgb, floats, rgb[None], first, first[None], floats.transpose(2, 0, 1)[None]):
        assert np.array_equal(pixels(load_image(Tensor(array))), rgb)

    class Interface:
        __array_interface__ = np.ascontiguousarray(rgb).__array_interface__

    assert np.array_equal(pixels(load_image(Interface())), rgb)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Tensor: Got unsupported ScalarType BFloat16: need one of uint8"):
        load_image(Tensor(np.zeros((2, 2), np.complex64)))
    with pytest.raises(ImageError, match=r"array of shape \[2, 5, 7, 3\].*give each by itself"):
        load_image(Tensor(np.stack([rgb, rgb])))


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    rgb = np.asarray(drawn(7, 5))
    tensor = torch.from_numpy(rgb.copy())
    for source in (tensor, tensor.permute(2, 0, 1)[None], (tensor / 255).requires_grad_()):
        assert np.array_equal(pixels(load_image(source)), rgb)


def test_other_arrays() -> None:
    rgb = np.asarray(drawn(7, 5))
    grey = rgb[:, :, 0]
    three = np.repeat(grey[:, :, None], 3, axis=2)
    wide = rgb.astype(np.uint16) * 257
    cases = [
        (rgb[None], rgb),
        (rgb[None, None], rgb),
        (grey[None], three),
        (grey[None, :, :, None], three),
        (grey[None, None], three),
        (wide, rgb),
        (wide.astype(">u2"), rgb),
        (wide[:, :, 0], three),
        (wide + np.uint16(0) - (wide > 0) * np.uint16(100), rgb),
        (grey > 99, (three > 99) * np.uint8(255)),
        (rgb > 99, (rgb > 99) * np.uint8(255)),
        ((rgb / 255).astype(">f4"), rgb),
    ]
    for array, expected in cases:
        assert np.array_equal(pixels(load_image(array)), expected)
    with_alpha = np.dstack([wide, np.zeros((5, 7), np.uint16)])
    assert (pixels(load_image(with_alpha)) == 255).all()
    with pytest.raises(ImageError, match=r"transpose\(1, 2, 0\) puts the channels last"):
        load_image(rgb.transpose(2, 0, 1))


NOISE = np.random.default_rng(1).bytes(3_000_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://example.org/cat.png", "a web address: fetch it first"),
        ("HTTP://example.org/cat.png?" + "x" * 5000, "a web address: fetch it first"),
        ("s3://bucket/cat.png", "an address of 's3': fetch it first"),
        ("<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG or HTML: give a picture"),
        (base64.b64encode(saved(drawn(4, 3))).decode(), "looks like base64"),
        (base64.urlsafe_b64encode(saved(drawn(4, 3), "JPEG")).decode(), "looks like base64"),
        (
            base64.b64encode(NOISE).decode(),
            "a text of 4,000,000 characters that looks like base64",
        ),
        ("data:image/png;base64," + "#" * 3_000_000, "invalid base64"),
        ("data:" + "x" * 3_000_000, "not a base64 data: URL"),
    ],
    ids=range(9),
)
def test_texts_that_are_no_path(text: str, message: str) -> None:
    for door in (load_image, lambda text: load_image(open_source(text))):
        with pytest.raises(ImageError, match=message) as caught:
            door(text)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["long/" * 1000 + "cat.png", "word " * 100_000, "x" * 250, "é" * 5000])
def test_errors_show_no_more_than_200_characters(text: str) -> None:
    for source in (text, Path(text)):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            load_image(source)
        assert len(str(caught.value)) < 400
    with pytest.raises(OSError) as caught:  # noqa: PT011
        open_source(text)
    assert len(str(caught.value)) < 400


def test_avif_where_pillow_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = pytest.importorskip("PIL.AvifImagePlugin")
    if not plugin.SUPPORTED:
        pytest.skip("this Pillow reads no AVIF")
    data = saved(drawn(24, 16), "AVIF", quality=100)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels(load_image(data)), np.asarray(image.convert("RGB")))
    for n_bytes in range(0, len(data), 7):
        with pytest.raises(ImageError):
            load_image(data[:n_bytes])
    monkeypatch.setattr(plugin, "SUPPORTED", False)
    with pytest.raises(
        ImageError, match=r"an AVIF picture, which this Pillow cannot read: install Pillow 11\.3"
    ):
        load_image(data)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"msf1\0\0\0\0hevc"])
def test_heic_without_its_reader(monkeypatch: pytest.MonkeyPatch, brands: bytes) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r'a HEIC picture: pip install "pyllava\[heif\]", or convert it'):
        load_image(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(99))


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(file, quality=90)
    loaded = load_image(file)
    assert loaded.size == (64, 48)
    assert np.abs(pixels(loaded).astype(int) - RED).max() < 12
    with pytest.raises(ImageError):
        load_image(file.getvalue()[: len(file.getvalue()) // 2])


def test_closed_pil_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    drawn(3, 3).save(path)
    image = Image.open(path)
    image.close()
    with pytest.raises(ImageError, match="PIL image"):
        load_image(image)


def test_pillow_is_left_as_it_was(tmp_path: Path) -> None:
    state = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters), list(Image.ID))
    data = saved(drawn(50, 40), "JPEG")
    threads = [threading.Thread(target=lambda: [load_image(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        list(warnings.filters),
        list(Image.ID),
    )


# --- data: URLs ---


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:image/png;base64", "image/png;base64,QUJD", "", "data:;base64x,QUJD"]
)
def test_no_data_url(url: str) -> None:
    with pytest.raises(ImageError, match="not a base64 data: URL"):
        decode_data_url(url)


@pytest.mark.parametrize("body", ["QUJDR", "QU=D", "Q\u00e9==", "####"])
def test_bad_base64(body: str) -> None:
    with pytest.raises(ImageError, match="invalid base64"):
        decode_data_url(f"data:image/png;base64,{body}")


def test_data_url() -> None:
    assert decode_data_url("data:image/jpeg;base64,QUJD\n REVG") == b"ABCDEF"
    for body in ("+/9BQg==", "+/9BQg", "-_9BQg", "%2B%2F9BQg%3D%3D", "+/\r\n9B Qg", "%2b_9BQg%0A"):
        assert decode_data_url(f"data:text/plain;charset=utf-8;BASE64,{body}") == b"\xfb\xffAB"
    with pytest.raises(ImageError, match="image in a data: URL: empty"):
        load_image("data:image/png;base64,")


@pytest.mark.parametrize(
    "head", ["data:;base64", "data:base64", "data:", "DATA:video/mp4;x=y", "data:image/png; base64 "]
)
def test_data_url_with_a_wrong_head(head: str) -> None:
    data = saved(drawn(5, 4))
    for body in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode().rstrip("=")):
        assert load_image(f"{head},{body}") == drawn(5, 4)
    if "base64" not in head:
        escaped = "".join(f"%{byte:02X}" for byte in data)
        assert load_image(f"{head},{escaped}") == drawn(5, 4)


# --- arrays ---


def test_arrays() -> None:
    rgb = np.asarray(drawn(7, 5))
    grey = rgb[:, :, 0]
    grey_rgb = np.repeat(grey[:, :, None], 3, axis=2)
    read_only = rgb.copy()
    read_only.flags.writeable = False
    cases = [
        (rgb, rgb),
        (read_only, rgb),
        (np.asfortranarray(rgb), rgb),
        (rgb[::-1, ::-1], rgb[::-1, ::-1]),
        (rgb[::2, 1::2], rgb[::2, 1::2]),
        (rgb[:, :, ::-1], rgb[:, :, ::-1]),
        (grey, grey_rgb),
        (grey[:, :, None], grey_rgb),
        (rgb / 255, rgb),
        ((rgb / 255).astype(np.float32), rgb),
        (grey / 255, grey_rgb),
    ]
    for array, expected in cases:
        before = array.copy()
        assert np.array_equal(pixels(load_image(array)), expected)
        assert np.array_equal(array, before)
    with_alpha = np.dstack([rgb, np.zeros((5, 7), np.uint8)])
    assert (pixels(load_image(with_alpha)) == 255).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (2, 2, 5), (3, 8, 8), (2, 2, 2, 3)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need \[H, W\]"):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.int8, np.complex64, object, "U3"])
def test_array_types(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"need uint8, or floats in 0\.\.1"):
        load_image(np.zeros((2, 2, 3), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5, 255.0])
def test_float_array_range(value: float) -> None:
    array = np.zeros((2, 2, 3))
    array[1, 1, 1] = value
    with pytest.raises(ValueError, match=r"need 0\.\.1"):
        load_image(array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_a_rounding_error_outside(dtype: Any) -> None:
    array = np.array([[-9e-4, -1e-9, 0.5, 1 + 1e-7, 1.0009]], dtype)
    assert pixels(load_image(array))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    for value in (-0.002, 1.002):
        with pytest.raises(ImageError, match=r"need 0\.\.1"):
            load_image(np.array([[0.5, value]], dtype))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0)])
def test_empty_array(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="no pixels"):
        load_image(np.zeros(shape, np.uint8))


BROADCAST = """
import resource, sys
import numpy as np
from pyllava.images import load_image
array = np.broadcast_to(np.{dtype}({value}), (6000, 6000, 3))
load_image(array[:8, :8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = load_image(array)
assert image.getpixel((5999, 5999)) == (128, 128, 128), image.getpixel((5999, 5999))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize(
    ("dtype", "value"), [("float64", 0.5), ("float16", 0.5), ("uint8", 128), ("uint16", 32896)]
)
def test_an_array_without_memory_behind_it(dtype: str, value: float) -> None:
    """36 megapixels take what their picture takes, 4 bytes a pixel, and a band."""
    code = BROADCAST.format(dtype=dtype, value=value)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) / 1024 < 144 + 110


# --- content hash ---


def test_content_hash() -> None:
    picture = drawn(30, 100)
    same_bytes = Image.frombytes("RGB", (100, 30), picture.tobytes())
    assert len(content_hash(picture)) == 16
    assert content_hash(picture) == content_hash(load_image(saved(picture)))
    assert content_hash(picture) != content_hash(same_bytes)


# --- in bands ---


def test_bands_are_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[Any] = [np.asarray(drawn(37, 53)) / 255, np.asarray(drawn(37, 53)).astype(np.uint16) * 200]
    modes = ["1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
    by_way_of = {"I;16": "L", "RGBa": "RGBA", "PA": "RGBA", "La": "LA"}
    sources += [drawn(37, 53).convert(by_way_of.get(mode, "RGB")).convert(mode) for mode in modes]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        sources.append(saved(drawn(37, 53), "PNG", exif=exif))
    wholes = [load_image(source) for source in sources]
    specs = [
        ImageSpec(28),
        ImageSpec(28, aspect="squash"),
        ImageSpec(28, aspect="anyres", pinpoints=((56, 28), (28, 56))),
    ]
    views = [preprocess(whole, spec).pixels for whole in wholes for spec in specs]
    hashes = [content_hash(whole) for whole in wholes]
    for n_pixels in (1, 100, 400):
        monkeypatch.setattr(_pixels, "_BAND_PIXELS", n_pixels)
        monkeypatch.setattr(views_module, "_BAND_PIXELS", n_pixels)
        monkeypatch.setattr(views_module, "_LONG", n_pixels)
        banded = [load_image(source) for source in sources]
        assert banded == wholes
        assert [content_hash(whole) for whole in banded] == hashes
        now = [preprocess(whole, spec).pixels for whole in banded for spec in specs]
        assert all(map(np.array_equal, now, views))


class Clock:
    """The longest time between two signals that Python got to see: what Ctrl-C would have waited."""

    def __enter__(self) -> Clock:
        self.longest, self.last = 0.0, time.monotonic()
        self.before = signal.signal(signal.SIGALRM, self.tick)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        return self

    def tick(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now

    def __exit__(self, *failure: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.tick(0, None)
        signal.signal(signal.SIGALRM, self.before)


def stops(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_a_long_call_can_be_left() -> None:
    """The call goes on unseen; the next one begins when it has ended, and one that nobody waits for never does."""
    running, most = [0], [0]
    begun: list[str] = []

    def call(name: str, seconds: float) -> str:
        begun.append(name)
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(seconds)
        running[0] -= 1
        return name

    before = signal.signal(signal.SIGALRM, stops)
    try:
        for name in ("left", "never begun"):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                leavable(lambda name=name: call(name, 1.0))
            assert time.monotonic() - began < 0.6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert leavable(lambda: call("next", 0.0)) == "next"
    assert begun == ["left", "next"]
    assert most == [1]
    with pytest.raises(ZeroDivisionError):
        leavable(lambda: 1 // 0)


@pytest.mark.parametrize("format_", ["JPEG", "TIFF"])
def test_a_picture_decoded_on_a_thread(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture"
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"progressive": True} if format_ == "JPEG" else {"compression": "tiff_lzw"}
    drawn(37, 53).save(path, format_, exif=exif, **options)
    sources = [path, path.read_bytes(), io.BytesIO(path.read_bytes())]
    cut = path.read_bytes()[:-300]
    usual = [load_image(source) for source in sources]
    shown_cut = load_image(cut, on_truncated="pad") if format_ == "JPEG" else None
    monkeypatch.setattr(_picture_files, "_LONG", 1)
    assert [load_image(source) for source in sources] == usual
    with pytest.raises(ImageError, match="damaged or unusable"):
        load_image(cut)
    assert shown_cut is None or load_image(cut, on_truncated="pad") == shown_cut


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
@pytest.mark.parametrize(
    "kind", ["PIL", "RGBA", "array", "float64", "JPEG", "progressive", "TIFF", "PNG", "turned"]
)
def test_ctrl_c_in_a_picture_of_170_megapixels(kind: str) -> None:
    size = (13_300, 12_800)
    flat = Image.new(
        "RGBA" if kind == "RGBA" else "RGB", size, (9, 99, 200, 77)[: 4 if kind == "RGBA" else 3]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    source: Any = {
        "array": lambda: np.asarray(flat),
        "JPEG": lambda: saved(flat, "JPEG"),
        "progressive": lambda: saved(flat, "JPEG", progressive=True),
        "TIFF": lambda: saved(flat, "TIFF", compression="tiff_lzw"),
    }.get(kind, lambda: flat)()
    if kind == "float64":
        source = np.broadcast_to(0.5, (*size[::-1], 3))
    elif kind in ("PNG", "turned"):
        source = saved(flat, "PNG", **({"exif": exif} if kind == "turned" else {}))
    with Clock() as clock:
        picture = load_image(source)
    assert clock.longest < 0.25
    with Clock() as clock:
        content_hash(picture)
        preprocess(picture, ImageSpec(336))
        preprocess(picture, ImageSpec(336, aspect="anyres", pinpoints=((672, 672), (336, 1008))))
    assert clock.longest < 0.25


# --- preprocessing ---


def u8_of(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    (view,) = pad(image, spec)
    return np.asarray(view).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "golden", json.loads(G["GOLDENS"].read_text()), ids=lambda row: "x".join(map(str, row["size"]))
)
def test_goldens(golden: dict[str, Any]) -> None:
    picture, spec = drawn(*golden["size"]), ImageSpec(golden["image_size"])
    views = preprocess(picture, spec)
    assert views.pixels.shape == (1, 3, spec.image_size, spec.image_size)
    assert views.pixels.dtype == np.float32
    assert views.pixels.flags.c_contiguous
    assert views.size == tuple(golden["size"])
    assert G["digest"](u8_of(picture, spec)) == golden["u8"]
    values = views.pixels.flat[G["sample_indices"](views.pixels.size)]
    assert np.abs(values - golden["values"]).max() <= 1e-6


sides = st.integers(1, 40) | st.integers(1, 700)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([336, 224, 112, 57]), st.integers(0, 2**32 - 1))
@example(1, 1, 336, 0)
@example(2, 3000, 336, 1)
@example(3000, 2, 336, 2)
@example(336, 336, 336, 3)
@example(336, 42, 336, 4)
@example(42, 336, 336, 5)
@example(1200, 1600, 336, 6)
def test_same_bytes_as_the_whole_square(width: int, height: int, image_size: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for array in (noise, (noise > 127) * np.uint8(255)):
        picture = Image.fromarray(array)
        whole = on_square(picture).resize((image_size, image_size), Image.Resampling.BICUBIC)
        assert np.array_equal(u8_of(picture, ImageSpec(image_size)), np.asarray(whole).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 20_000), (52_800, 44), (44, 20_000), (1, 65_535)])
def test_very_long_pictures(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, RED)
    centre = preprocess(picture, ImageSpec(336)).pixels
    assert np.isfinite(centre).all()
    assert centre.shape == (1, 3, 336, 336)


def test_other_mean_and_std() -> None:
    spec = ImageSpec(8, (0.5, 0.25, 0.999), (0.5, 0.1, 2.0))
    assert spec.pad_color == (127, 63, 254)
    views = preprocess(Image.new("RGB", (4, 8), (0, 51, 255)), spec).pixels[0]
    assert np.allclose(views[:, 4, 4], [-1.0, -0.5, 0.0005], atol=1e-6)
    assert np.allclose(
        views[:, 4, 0], [(127 / 255 - 0.5) / 0.5, (63 / 255 - 0.25) / 0.1, (254 / 255 - 0.999) / 2], atol=1e-6
    )


@pytest.mark.parametrize("options", [{"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}, {"image_size": 0}])
def test_bad_spec(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need a positive size"):
        ImageSpec(**{"image_size": 336, **options})


def test_preprocess_needs_rgb() -> None:
    with pytest.raises(ValueError, match="need RGB"):
        preprocess(Image.new("L", (4, 4)), ImageSpec(336))


@pytest.mark.reference
@settings(max_examples=40, deadline=None)
@given(sides, sides, st.sampled_from([336, 224, 112]), st.integers(0, 2**32 - 1))
@example(640, 480, 336, 0)
@example(1, 1, 336, 0)
def test_equal_to_transformers(width: int, height: int, image_size: int, seed: int) -> None:
    pytest.importorskip("transformers")
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture, spec = Image.fromarray(noise), ImageSpec(image_size)
    u8, normalised = G["reference"](picture, image_size)
    assert np.array_equal(u8_of(picture, spec), u8)
    assert np.abs(preprocess(picture, spec).pixels[0] - normalised).max() <= 1e-6


@pytest.mark.reference
def test_goldens_are_what_transformers_gives() -> None:
    pytest.importorskip("transformers")
    for golden in json.loads(G["GOLDENS"].read_text()):
        u8, _ = G["reference"](drawn(*golden["size"]), golden["image_size"])
        assert G["digest"](u8) == golden["u8"]


def test_old_imports_go_on_working() -> None:
    """What became a module of its own is still where it was."""
    from pyllava import cli, images, llava, views

    for name in (
        "ImageSpec",
        "Views",
        "anyres",
        "best_resolution",
        "pad",
        "preprocess",
        "squash",
        "tile_grid",
    ):
        assert getattr(images, name) is getattr(views, name)
    for name in ("Chat", "ImageEmbedding", "Options", "Sampling"):
        assert hasattr(llava, name)
    assert callable(cli.main)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = images.nothing  # type: ignore[attr-defined]
