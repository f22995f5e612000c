"""The words of a command line that belong to no option: pictures, and the question about them."""

from __future__ import annotations

import os
import re

from .._named_pictures import SUFFIXES
from .._sources import is_data_url

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|file:/")


def stands_alone(word: str) -> bool:
    """Whether a word is no option."""
    return word == "-" or not word.startswith("-")


def is_picture(word: str) -> bool:
    """Whether a word means a picture, and no question: there is such a file, or it looks like the name of one."""
    if word == "-" or is_data_url(word) or _ADDRESS.match(word) or is_there(word):
        return True
    return not is_sentence(word) and (word.lower().endswith(SUFFIXES) or os.sep in word)


def is_sentence(word: str) -> bool:
    return any(map(str.isspace, word))


def is_there(word: str) -> bool:
    return bool(word) and os.path.lexists(os.path.expanduser(word))


def is_model(word: str) -> bool:
    """Whether a word names a model, which is none of the pictures: a GGUF file, or a folder of them."""
    path = os.path.expanduser(word)
    if os.path.isdir(path):
        names = os.listdir(path)
        return any(name.lower().endswith(".gguf") for name in names) and not any(
            name.lower().endswith(SUFFIXES) for name in names
        )
    return path.lower().endswith(".gguf") and not is_sentence(path)
