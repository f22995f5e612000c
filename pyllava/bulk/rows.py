"""The row of a picture: what was found out about it on its way, and what became of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..answer import Answer
from ..images import load_image
from .inputs import Entry
from .tables import Row
from .texts import Texts


class Picture:
    """An entry on its way to the model."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._known: Row = {}

    def load(self) -> Image.Image:
        """Reads and decodes it, and remembers what its row says of it."""
        stamp = self.entry.stamp()
        if stamp is not None:
            self._known |= {"bytes": stamp[0], "mtime_ns": stamp[1]}
        stream = self.entry.read()
        self._known["sha256"] = hashlib.sha256(stream.getbuffer()).hexdigest()
        image = load_image(stream)
        self._known |= {"width": image.width, "height": image.height}
        return image

    @property
    def facts(self) -> Row:
        names = ("sha256", "width", "height", "bytes", "mtime_ns")
        return {name: self._known.get(name) for name in names}


@dataclass(frozen=True)
class Rows:
    """Makes rows: `model` is the model's name, `settings` the digest of all that captions depend on."""

    texts: Texts
    model: str
    settings: str
    has_data: bool = False
    """Answers are structured: a row has what they say, and one that was cut is an error."""

    def row(self, picture: Picture, answers: tuple[Answer, ...], error: Exception | None) -> Row:
        """Of a picture and its answers, or the error that took their place."""
        facts = picture.facts
        found = outcome(self.texts, answers, error, picture.entry.path, has_data=self.has_data)
        captions: Row = {name: found.pop(name) for name in ("caption", "captions", "data") if name in found}
        return {
            "path": picture.entry.path,
            "sha256": facts.pop("sha256"),
            "width": facts.pop("width"),
            "height": facts.pop("height"),
            **captions,
            "prompt": self.texts.prompt_of(picture.entry),
            "model": self.model,
            **found,
            **facts,
            "settings": self.settings,
        }


def outcome(
    texts: Texts,
    answers: Sequence[Answer],
    error: Exception | None,
    path: str,
    *,
    has_data: bool = False,
) -> Row:
    """The part of a row that says what became of a picture; an answer may turn out to be an error."""
    captions: list[str] = []
    if error is None:
        try:
            if has_data and any(answer.was_cut for answer in answers):
                raise ValueError("the answer ended before it was whole: raise -n")
            captions = [texts.caption_of(answer.text) for answer in answers]
        except ValueError as refusal:
            error = refusal
    seconds = math.fsum(a.timings.encode + a.timings.prefill + a.timings.decode for a in answers)
    ends = dict.fromkeys(answer.finish_reason for answer in answers)
    return {
        "caption": captions[0] if captions else None,
        **({"captions": captions} if len(captions) > 1 else {}),
        **({"data": _data(answers) if error is None else None} if has_data else {}),
        "tokens": sum(answer.usage.completion_tokens for answer in answers),
        "seconds": round(seconds, 4),
        "finish_reason": ",".join(ends) or None,
        "status": "ok" if error is None else "error",
        "error": None if error is None else reason(error, path),
    }


def _data(answers: Sequence[Answer]) -> Any:
    """What the answers say; of several, a list."""
    return answers[0].data if len(answers) == 1 else [answer.data for answer in answers]


def reason(error: Exception, path: str) -> str:
    """What an error says, without the path that stands beside it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).removeprefix(f"{path}: ") or type(error).__name__
