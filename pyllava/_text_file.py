"""Text from files and pipes, whichever system wrote it: UTF-8, a mark in front or none, lines that end in LF or CRLF."""

from __future__ import annotations

import codecs

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def text_of(data: bytes, name: str) -> str:
    """The text in `data`, from the file called `name`. Raises ValueError, with the name, where it is not UTF-8."""
    check_start(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{name}: not UTF-8 text ({found}): save it as UTF-8") from None
    return text.replace("\r\n", "\n")


def check_start(data: bytes, name: str) -> None:
    """Raises ValueError where a text begins as one of UTF-16, which Windows calls Unicode."""
    if data.startswith(_UTF_16):
        raise ValueError(f"{name}: UTF-16 text, need UTF-8: save it as UTF-8")
    if b"\0" in data[:256]:
        raise ValueError(f"{name}: zero bytes, as in UTF-16 text, need UTF-8: save it as UTF-8")
