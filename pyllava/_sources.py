"""Where pictures come from: paths, URLs, bytes, pipes and file objects, as files that can seek."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import select
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from ._picture_heads import HEAD_BYTES, MAX_BYTES, check_head, is_picture
from .errors import ImageError

WAIT_FOR_WRITER = 5.0
"""Seconds that opening a named pipe waits for somebody to write into it."""
_CHUNK = 1 << 20
_SHOWN = 200
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?=//)|(file):(?=/)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{16,}={0,2}\s*")


class Readable(Protocol):
    """A file opened for reading bytes, an upload, a response: what has `read`."""

    def read(self, n_bytes: int, /) -> bytes: ...


class Stream(io.BytesIO):
    """Bytes read to their end, and what messages call them."""

    name = "image bytes"


def shown(text: str) -> str:
    """A text that a user gave, of at most 200 characters."""
    return text if len(text) <= _SHOWN else f"{text[:120]}...{text[-60:]}"


# --- texts ---


def is_data_url(source: object) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def decode_data_url(text: str) -> bytes:
    """The bytes in a ``data:`` URL of any media type, or none. Raises ImageError if it is no such URL.

    The base64 may lack its padding, use the URL-safe alphabet and be percent-escaped. Where the URL does not
    say that it is base64, its bytes are taken if they begin as a picture does.
    """
    head, comma, body = text.partition(",")
    is_url = bool(comma) and is_data_url(head)
    if is_url and re.search(r";\s*base64\s*$", head[-64:], re.IGNORECASE):
        try:
            return _base64(body)
        except ValueError as error:  # binascii.Error is one
            raise ImageError(f"data: URL: invalid base64 ({str(error)[:100]})") from None
    if is_url:
        for decode in (unquote_to_bytes, _base64):
            with contextlib.suppress(ValueError):
                if is_picture(data := decode(body)):
                    return data
    raise ImageError(f"not a base64 data: URL: starts with {text[:32]!r}, need 'data:image/...;base64,'")


def _base64(text: str) -> bytes:
    if "%" in text:
        text = unquote(text, errors="strict")
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def local_path(source: str | os.PathLike[str]) -> str:
    """The path that a text stands for: itself, a ``file:`` URL, or one below ``~``.

    Raises ImageError for the addresses that cannot be opened, and for texts that are no path at all.
    """
    text = os.fsdecode(source)
    scheme = _SCHEME.match(text[:64]) if isinstance(source, str) else None
    if scheme is not None and not os.path.lexists(text):
        return _path_of_url(text)
    if text.startswith("~") and not os.path.lexists(text):
        return os.path.expanduser(text)
    if isinstance(source, str) and len(text) > 32 and not os.path.lexists(text[:4096]):
        _check_is_path(text)
    return text


def input_files(source: str) -> list[Path]:
    """The file that a text names, over which nothing may be written; none for ``-`` and a data: URL."""
    path = Path() if source == "-" or is_data_url(source) else Path(local_path(source))
    return [path] if path.is_file() else []


def _path_of_url(text: str) -> str:
    scheme = text.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise ImageError(f"{shown(text)}: a web address: fetch it first, and give the file or its bytes")
    if scheme != "file":
        raise ImageError(f"{shown(text)}: an address of {scheme[:20]!r}: fetch it first, and give the file")
    url = urlsplit(text)
    if url.netloc.lower() not in ("", "localhost"):
        raise ImageError(f"{shown(text)}: a file on another computer: give a path on this one")
    path = os.fsdecode(unquote_to_bytes(url.path))
    return path[1:] if os.name == "nt" and re.match(r"/[A-Za-z]:", path) else path


def _check_is_path(text: str) -> None:
    """Base64 and SVG are given as if they were paths: say so."""
    begin = text[:4096]
    is_mixed = all(re.search(kind, begin) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    if _BASE64.fullmatch(begin) and (_begins_as_picture(text) or (len(text) > 4096 and is_mixed)):
        raise ImageError(
            f"a text of {len(text):,} characters that looks like base64: decode it (base64.b64decode), "
            "or put 'data:image/...;base64,' before it"
        )
    if text.lstrip()[:5].lower() in ("<svg ", "<?xml", "<!doc", "<html"):
        raise ImageError(f"a text of {len(text):,} characters, SVG or HTML: give a picture, rendered as PNG")


def _begins_as_picture(text: str) -> bool:
    with contextlib.suppress(ValueError):
        head = "".join(text[:400].split())
        return is_picture(_base64(head[: len(head) // 4 * 4]))
    return False


# --- files ---


def open_path(path: str) -> BinaryIO:
    """The file at `path`, opened for reading; a pipe or a device is read to its end.

    Opening never waits for long: a named pipe that nobody opens for writing within 5 seconds is refused. Once
    there is a writer, its end is waited for.
    """
    name = shown(path)
    if os.path.isdir(path):
        raise ImageError(f"{name}: a folder, not an image file")
    nonblocking = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO must not wait for a writer
    try:
        descriptor = os.open(path, os.O_RDONLY | nonblocking | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise error if len(path) <= _SHOWN else type(error)(error.errno, error.strerror, name) from None
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, descriptor)
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            return _drained(descriptor, name, is_pipe=stat.S_ISFIFO(kind))
        opened.pop_all()
    return os.fdopen(descriptor, "rb")


def _drained(descriptor: int, name: str, *, is_pipe: bool) -> Stream:
    if os.isatty(descriptor):
        raise ImageError(f"{name}: a terminal, not an image file")
    if is_pipe:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(WAIT_FOR_WRITER * 1000):
            raise ImageError(f"{name}: a pipe into which nobody writes (waited {WAIT_FOR_WRITER:g} s)")
    os.set_blocking(descriptor, True)
    return _read_all(lambda n_bytes: os.read(descriptor, n_bytes), name)


def open_stream(source: Any) -> Stream:
    """All of a file object: from its beginning where it can seek, as Pillow reads it."""
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    name = shown(name) if isinstance(name, str) and name else "image file"
    try:
        if source.seekable():
            source.seek(0)
    except (AttributeError, OSError, TypeError):
        pass  # not every reader knows how; it is read from where it stands
    except ValueError as error:  # it is closed
        raise ImageError(f"{name}: {shown(str(error))}") from None
    return _read_all(source.read, name)


def open_stdin() -> Stream:
    """All of standard input, read once."""
    source = getattr(sys.stdin, "buffer", None)
    if source is None:
        raise ImageError("standard input: closed, or not a file of bytes")
    if sys.stdin.isatty():
        raise ImageError("standard input: a terminal; pipe a picture into it, or name a file")
    return _read_all(source.read, "standard input")


def _read_all(read: Callable[[int], bytes], name: str) -> Stream:
    """To the end, but not on after a beginning that is no picture's, nor beyond the largest file."""
    file, is_checked = Stream(), False
    file.name = name
    while chunk := read(_CHUNK):
        if hasattr(chunk, "__await__"):
            getattr(chunk, "close", lambda: None)()
            raise TypeError(f"{name}: its read() is asynchronous: give the bytes, `await file.read()`")
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise TypeError(
                f"{name}: read() gives {type(chunk).__name__}, need bytes: open it with mode 'rb'"
            )
        file.write(chunk)
        if not is_checked and file.tell() >= HEAD_BYTES:
            check_head(file.getvalue()[:HEAD_BYTES], name)
            is_checked = True
        if file.tell() > MAX_BYTES:
            raise ImageError(f"{name}: more than {MAX_BYTES:,} bytes")
    file.seek(0)
    return file
