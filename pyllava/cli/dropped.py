"""Pictures in a line of a conversation: paths that a file manager dropped there, or that were typed as in ollama."""

from __future__ import annotations

import os
import re
import shlex

from .._named_pictures import SUFFIXES
from .._sources import local_path
from ..errors import ImageError

_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""")


def dropped(message: str) -> tuple[list[str], str]:
    """The pictures that a line is, or begins or ends with, and the rest of it.

    In the midst of words only a path with a folder counts, and no file counts that is not there.
    """
    line = message.strip()
    if (path := _picture(line)) is not None:
        return [path], ""
    tokens = list(_TOKEN.finditer(line))
    found = [_picture(token[0]) for token in tokens]
    if found and all(found):
        return [path for path in found if path], ""
    if line.startswith("/") and not (found and found[0]):
        return [], message  # a command, whose argument may be a path
    begin, end = 0, len(tokens)
    while found[begin:end] and found[begin] and _has_folder(tokens[begin][0]):
        begin += 1
    while found[begin:end] and found[end - 1] and _has_folder(tokens[end - 1][0]):
        end -= 1
    paths = [path for path in (*found[:begin], *found[end:]) if path]
    return (paths, line[tokens[begin].start() : tokens[end - 1].end()]) if paths else ([], message)


def looks_dropped(message: str) -> bool:
    """Whether a line is the path of a picture and nothing else, which `dropped` has not found."""
    words = message.split()
    return len(words) == 1 and words[0].lower().endswith(SUFFIXES) and not words[0].startswith("/")


def _has_folder(token: str) -> bool:
    return os.sep in token or "/" in token


def _picture(token: str) -> str | None:
    """The file that a token names, quoted or escaped as in a shell, if it is there and its name is a picture's."""
    for text in dict.fromkeys((token, _as_shell(token))):
        try:
            path = local_path(text)
        except ImageError:  # an address, say
            continue
        if path.lower().endswith(SUFFIXES) and os.path.isfile(path):
            return path
    return None


def _as_shell(token: str) -> str:
    """The one word that a shell makes of a token; the token itself where it makes none, or several."""
    try:
        words = shlex.split(token)
    except ValueError:  # an apostrophe, say
        return token
    return words[0] if len(words) == 1 else token
