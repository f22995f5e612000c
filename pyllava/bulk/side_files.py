"""The text beside each picture, as tools for training data have it: written under another name and renamed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .._named_pictures import SUFFIXES
from .._part_file import replacing
from .inputs import Entry
from .lock import locked_folder

Existing = Literal["skip", "overwrite", "append", "prepend"]


@dataclass(frozen=True)
class SideFiles:
    """Where they lie, and what becomes of one that is there already.

    `extension` takes the place of the picture's; ``{ext}`` in it stands for that. Raises ValueError for that of a picture.
    """

    extension: str = ".txt"
    existing: Existing = "skip"

    def __post_init__(self) -> None:
        if not self.extension.startswith(".") or os.sep in self.extension or "\0" in self.extension:
            raise ValueError(
                f"caption extension {self.extension!r}: need one that begins with a dot, as .txt"
            )
        if self.extension.lower().endswith((*SUFFIXES, "{ext}")):
            raise ValueError(f"caption extension {self.extension!r}: that of a picture, need one of a text")

    def path_of(self, entry: Entry) -> str:
        stem, suffix = os.path.splitext(entry.path)
        return stem + self.extension.replace("{ext}", suffix.removeprefix("."))

    def check(self, entries: Iterable[Entry]) -> dict[str, str]:
        """Why pictures cannot have one, by path: another one has it. Raises ValueError or OSError where none can be written."""
        owners: dict[str, str] = {}
        refused, folders = {}, set()
        for entry in entries:
            if not entry.has_place:
                raise ValueError(f"{entry.path}: no place for a file beside it: name an output with -o")
            owner = owners.setdefault(self.path_of(entry), entry.path)
            if owner != entry.path:
                refused[entry.path] = (
                    f"its text would be that of {owner} ({self.path_of(entry)}): rename one of them, or use "
                    "--caption-extension .{ext}.txt"
                )
            folders.add(entry.folder or os.curdir)
        for folder in sorted(folders):
            if os.path.isdir(folder):
                check_writable(folder)
        return refused

    def locked(self, entries: Sequence[Entry]) -> contextlib.AbstractContextManager[None]:
        """The folder that all of them are in, or below, is locked while this lasts."""
        folders = {os.path.abspath(entry.folder) for entry in entries}
        try:
            return locked_folder(os.path.commonpath(folders))
        except ValueError:  # no pictures, or on several drives of Windows, which locks no folders
            return contextlib.nullcontext()

    def exists(self, entry: Entry) -> bool:
        return os.path.lexists(self.path_of(entry))

    def is_in_place(self, entry: Entry, caption: str) -> bool:
        """Whether the picture's caption has been written already, as `existing` says."""
        if self.existing == "skip":
            return self.exists(entry)
        there = self._text(entry)
        caption = caption.rstrip()
        if self.existing == "append":
            return there.endswith(caption)
        return there.startswith(caption) if self.existing == "prepend" else there == caption

    def write(self, entry: Entry, caption: str) -> None:
        there = self._text(entry) if self.existing in ("append", "prepend") else ""
        parts = [caption, there] if self.existing == "prepend" else [there, caption]
        with replacing(Path(self.path_of(entry)), n_bytes=0, durable=False) as file:
            file.write(_joined([part for part in parts if part]).encode(errors="replace") + b"\n")

    def _text(self, entry: Entry) -> str:
        try:
            return Path(self.path_of(entry)).read_text("utf-8-sig", errors="surrogateescape").rstrip()
        except FileNotFoundError:
            return ""


def _joined(parts: list[str]) -> str:
    """A space between two texts, unless the second begins with what needs none."""
    *before, last = parts
    if not before:
        return last
    return before[0] + ("" if re.match(r"[\s,.;:]", last) else " ") + last


def check_writable(folder: str) -> None:
    """Raises PermissionError where no file can be made in a folder."""
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(13, "the folder cannot be written into", folder)
