"""The pictures that a command line names: files, folders, and patterns that a shell did not expand."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from typing import TypeVar

from .errors import ImageError

Source = TypeVar("Source")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")


def expanded(names: Iterable[str]) -> list[str]:
    """The sources that `names` stand for, in their order; what is in a folder or fits a pattern, as people sort.

    A folder stands for the picture files in it, a pattern for all files that fit it, ``a,b`` for two files. What exists is
    never a pattern. What gives nothing stays, for `found` to refuse in its place.
    """
    return [path for name in names for path in _expanded(name)]


def _expanded(name: str) -> list[str]:
    if "\0" in name or name[:5].lower() == "data:":
        return [name]
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _in_folder(path)
    if os.path.lexists(path):
        return [path]
    if glob.has_magic(path):
        files = [file for file in glob.iglob(path, recursive=True) if not os.path.isdir(file)]
        return sorted(files, key=by_number) or [name]
    parts = name.split(",")
    return parts if len(parts) > 1 and all(map(os.path.isfile, parts)) else [name]


def _in_folder(folder: str) -> list[str]:
    names = (name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    files = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    return sorted(files, key=by_number) or [folder]


def found(source: Source) -> Source:
    """`source`, unless it is a folder or a pattern that gave nothing: that is an ImageError."""
    if isinstance(source, str) and source[:5].lower() != "data:" and "\0" not in source:
        if os.path.isdir(source):
            raise ImageError(f"{source}: a folder without pictures ({', '.join(SUFFIXES)})")
        if glob.has_magic(source) and not os.path.lexists(source):
            raise ImageError(f"{source}: no file fits this pattern")
    return source


def by_number(path: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts ``img2`` before ``img10``, and capitals beside small letters."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.casefold())
    return [(0, int(part[:4000]), "") if part[0].isdigit() else (1, 0, part) for part in parts], path
