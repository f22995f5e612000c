"""The texts of a caption: the prompt of a picture, and what becomes of its answer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .inputs import Entry

_FIELD = re.compile(r"\{(name|dir|stem)\}")


@dataclass(frozen=True)
class Texts:
    """How prompts and captions are made; the order of its fields is that in which they are applied."""

    prompt: str
    """``{name}``, ``{dir}`` and ``{stem}`` stand for the file's name, its folder's name, and its name without an ending."""
    fail_phrases: Sequence[str] = ()
    """An answer that has one of them, in whatever case, is no caption."""
    strip: Sequence[str] = ()
    """Phrases that are taken off an answer's beginning, in whatever case."""
    prefix: str = ""
    suffix: str = ""

    def prompt_of(self, entry: Entry) -> str:
        folder = os.path.basename(os.path.dirname(os.path.abspath(entry.path)))
        fields = {"name": entry.name, "dir": folder, "stem": entry.stem}
        return _FIELD.sub(lambda found: _utf8(fields[found[1]]), self.prompt)

    def caption_of(self, answer: str) -> str:
        """Raises ValueError where the answer is empty, or says that there is none."""
        small = answer.casefold()
        for phrase in self.fail_phrases:
            if phrase.casefold() in small:
                raise ValueError(f"the answer has {phrase!r} in it: {answer[:80]!r}")
        text = answer.strip()
        for phrase in self.strip:
            text = text[_begin_size(text, phrase) :].lstrip()
        if not text:
            raise ValueError("the answer is empty")
        return f"{self.prefix}{text}{self.suffix}"


def _begin_size(text: str, phrase: str) -> int:
    """How many characters of `text` are `phrase` in whatever case, 0 if it begins otherwise; "ß" is "ss"."""
    folded, n = phrase.casefold(), 0
    while folded and n < len(text) and folded.startswith(begin := text[n].casefold()):
        folded, n = folded[len(begin) :], n + 1
    return 0 if folded else n


def _utf8(text: str) -> str:
    """A file's name need not be text, a prompt has to be."""
    return text.encode(errors="replace").decode()
