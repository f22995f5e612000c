"""A conversation as a file: Markdown to read, JSON to work with."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .._part_file import replacing
from .._version import __version__


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `images` are the paths of the pictures that came with the question."""

    question: str
    images: tuple[str, ...]
    answer: str
    finish_reason: str
    """That of the answer, or "interrupted"."""


@dataclass(frozen=True)
class Record:
    """A conversation and what it takes to have it again."""

    model: str
    mmproj: str | None
    template: str
    system: str | None
    """None: that of the template."""
    turns: Sequence[Turn]


def write(path: str, record: Record, *, replace: bool) -> None:
    """Writes all of the file or nothing of it; its suffix tells the format.

    Raises ValueError for another suffix, FileExistsError without `replace`.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        raise ValueError(f"{path}: need a name that ends in .md or .json")
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    text = _FORMATS[suffix](record).encode(errors="backslashreplace")  # a file's name may be any bytes
    with replacing(Path(os.path.realpath(path)), n_bytes=len(text)) as file:
        file.write(text)


def _json(record: Record) -> str:
    return json.dumps({"pyllava": __version__, **asdict(record)}, indent=2, ensure_ascii=False) + "\n"


def _markdown(record: Record) -> str:
    parts = [f"# A conversation with {os.path.basename(record.model)}"]
    if record.system is not None:
        parts.append(f"System message: {record.system}")
    for turn in record.turns:
        parts += [f"![{os.path.basename(path)}]({_link(path)})" for path in turn.images]
        parts.append("\n".join(f"> {line}".rstrip() for line in turn.question.split("\n")))
        parts.append(turn.answer)
        if turn.finish_reason == "interrupted":
            parts.append("*(stopped here)*")
    return "\n\n".join(parts) + "\n"


def _link(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace("<", "\\<").replace(">", "\\>")
    return f"<{escaped}>"


_FORMATS = {".md": _markdown, ".markdown": _markdown, ".json": _json}
