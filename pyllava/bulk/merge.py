"""Ledgers of several runs as one: of shards, of folders, of machines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .ledger import whole_rows
from .tables import Row


class Merged:
    """The rows of several ledgers, a picture once: the last that succeeded, else the last.

    Raises ValueError where two were written with other settings. Files are read twice, so that memory holds no captions.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._best: dict[str, tuple[bool, int, int]] = {}  # whether it succeeded, in which file, where
        settings: dict[str, Path] = {}
        for number, path in enumerate(paths):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: a folder, a pipe or a device, need a file: it is read twice")
            for at, row in _rows(path):
                is_ok = row["status"] == "ok"
                if is_ok:
                    settings.setdefault(str(row.get("settings")), path)
                self._best[row["path"]] = max(
                    (is_ok, number, at), self._best.get(row["path"], (False, -1, -1))
                )
        if len(settings) > 1:
            first, other = list(settings.values())[:2]
            raise ValueError(
                f"{first} and {other}: rows of different settings (prompt, model or options): not merged"
            )
        self.n_rows = len(self._best)
        self.n_failed = sum(not is_ok for is_ok, _, _ in self._best.values())

    def rows(self) -> Iterator[Row]:
        """In the order of the files."""
        for number, path in enumerate(self._paths):
            for at, row in _rows(path):
                if self._best[row["path"]][1:] == (number, at):
                    yield row


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as file:
        for at, _, row in whole_rows(file, os.fspath(path)):
            yield at, row
