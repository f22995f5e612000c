"""JPEG by its segments: what Pillow is better not given, and whether a file that was cut holds all its pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import ImageError

MAX_SCANS = 100
"""The most scans a JPEG may have; progressive pictures have about ten."""
MAX_METADATA = 1 << 20
"""Bytes of metadata before the pixels that Pillow is given: it joins EXIF segments in quadratic time."""
MAX_SEGMENTS = 65_536

END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")  # not the escapes and restarts inside a scan
_HEAD_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_SOS, _EOI, _COM = 0xDA, 0xD9, 0xFE
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NEEDED = (0xE0, 0xEE)  # JFIF and Adobe: they tell what the colours are
_READ = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")  # both may hold an orientation
_FILLINGS = (b"\xfe", b"\x55", b"\x00", b"\xaa\x3c\x71", b"\xd1\x6b\x98")


def light(data: bytes, name: str) -> bytes:
    """The same picture without the metadata, and the filling between segments, that are more than MAX_METADATA.

    The JFIF and Adobe segments stay, and EXIF and XMP as far as there is room.
    """
    kept, n_extra, at = [data[:2]], 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _HEAD_MARKER.search(data, at)
        if found is None:
            return data
        n_extra += found.start() - at
        kind, begin = found[1][0], found.end()
        at = begin + int.from_bytes(data[begin : begin + 2], "big")
        if kind < 0xC0 or 0xD0 <= kind <= _SOS or not begin + 2 <= at <= len(data):
            return data if n_extra <= MAX_METADATA else b"".join([*kept, data[found.start() :]])
        if 0xE0 <= kind <= 0xEF or kind == _COM:
            n_extra += at - begin
            is_read = kind == 0xE1 and data.startswith(_READ, begin + 2) and n_extra <= MAX_METADATA
            if not is_read and kind not in _NEEDED:
                continue
        kept.append(data[found.start() : at])
    raise ImageError(f"{name}: JPEG of more than {MAX_SEGMENTS:,} segments before its pixels")


def check_scans(data: bytes, name: str) -> None:
    """Refuse a progressive picture made to be decoded ten thousand times over."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # also counts thumbnails and noise in metadata
        return
    n_scans = sum(kind == _SOS for kind, _, _ in _segments(data))
    if n_scans > MAX_SCANS:
        raise ImageError(f"{name}: JPEG of {n_scans:,} scans, at most {MAX_SCANS}")


def is_ended(data: bytes) -> bool:
    """Whether the file has its last marker."""
    if data.rfind(END) > data.rfind(b"\xff\xda"):
        return True
    return any(kind == _EOI for kind, _, _ in _segments(data))


def ended(data: bytes) -> bytes:
    """A file that was cut, with an end behind its last whole segment: decoders show what they have."""
    return _whole_part(data) + END


def ended_otherwise(data: bytes) -> Iterator[bytes]:
    """The file with other bytes where it was cut, or before its end: a decoder that still needs bits makes other pixels of
    them.
    """
    end = next((begin - 2 for kind, begin, _ in _segments(data) if kind == _EOI), len(data))
    data = _whole_part(data[:end])
    scan = data.rfind(b"\xff\xda")
    last = max(range(8), key=lambda n: data.rfind(bytes([0xFF, 0xD0 + n]), scan))
    due = last + 1 if data.rfind(bytes([0xFF, 0xD0 + last]), scan) >= 0 else 0
    for bits in _FILLINGS:  # and restart markers: where one is due, decoders look for nothing else
        restarts = (bytes([0xFF, 0xD0 + (due + n) % 8]) + bits * 24 for n in range(8))
        yield b"".join((data, bits * 24, *restarts, END))


def has_all_scans(data: bytes) -> bool:
    """Whether every coefficient of every component was sent to its last bit, if the last scan is whole."""
    missing: dict[int, set[int]] = {}
    for kind, begin, end in _segments(data):
        head = data[begin:end]
        if end > len(data) or (len(head) < 8 and (kind == _SOS or kind in _FRAMES)):
            return False
        if kind in _FRAMES:
            missing = {component: set(range(64)) for component in head[8::3][: head[7]]}
        if kind == _SOS and head[-1] & 15 == 0:
            for component in head[3::2][: head[2]]:
                missing.get(component, set()).difference_update(range(head[-3], head[-2] + 1))
    return bool(missing) and not any(missing.values())


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Kind, begin (behind the marker) and end of each segment, to the end of the picture."""
    at = 2
    while found := _MARKER.search(data, at):
        kind, begin = found[1][0], found.end()
        at = begin + int.from_bytes(data[begin : begin + 2], "big")
        yield kind, begin, at
        if kind == _EOI:
            return


def _whole_part(data: bytes) -> bytes:
    for _, begin, end in _segments(data):
        if end > len(data) or begin + 2 > len(data):
            data = data[: begin - 2]
    return data.rstrip(b"\xff")
