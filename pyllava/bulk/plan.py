"""What is left to do: entries beside what a ledger and the side files say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from .inputs import STDIN, Entry
from .ledger import Known, Ledger
from .side_files import SideFiles


@dataclass
class Plan:
    """The entries, each in one of these."""

    todo: list[Entry] = field(default_factory=list)
    refused: list[tuple[Entry, str]] = field(default_factory=list)
    """Those that cannot have a side file, with the reason."""
    n_done: int = 0
    n_skipped: int = 0
    """Those that have a side file, which is not ours."""


def plan(entries: Iterable[Entry], ledger: Ledger | None, side: SideFiles | None, settings: str) -> Plan:
    """Sorts out what is to be done. Rows that will be replaced are taken out of the ledger; missing side files are written.

    Raises ValueError where the ledger was written with other settings.
    """
    entries = list(entries)
    refused = side.check(entries) if side is not None else {}
    found = Plan()
    if ledger is not None:
        _check_settings(ledger, settings)
    for entry in entries:
        known = ledger.known.get(entry.path) if ledger is not None else None
        if known is not None and known.is_ok and _is_same(entry, known):
            found.n_done += 1
            if side is not None and ledger is not None and entry.path not in refused:
                _complete(entry, ledger, side)
        elif entry.path in refused:
            found.refused.append((entry, refused[entry.path]))
        elif side is not None and side.existing == "skip" and side.exists(entry):
            found.n_skipped += 1
        else:
            found.todo.append(entry)
    if ledger is not None:
        again = {entry.path for entry in found.todo} | {entry.path for entry, _ in found.refused}
        ledger.forget(again & ledger.known.keys())
    return found


def _check_settings(ledger: Ledger, settings: str) -> None:
    for path, known in ledger.known.items():
        if known.is_ok and known.settings != settings:
            row = ledger.row(path)
            raise ValueError(
                f"{ledger.path}: was written with other settings (prompt {str(row.get('prompt'))[:60]!r}, model "
                f"{row.get('model')}): --overwrite begins anew, -o names another output"
            )


def _is_same(entry: Entry, known: Known) -> bool:
    """Whether a picture is the one that a row is about; one that is gone, or cannot be read, is taken for it."""
    if entry.path == STDIN:
        return False  # it can be read once, to be shown
    stamp = entry.stamp()
    if stamp is None or stamp == known.stamp:
        return True
    if known.stamp is not None and known.stamp[0] != stamp[0]:
        return False
    try:
        return hashlib.sha256(entry.read().getvalue()).hexdigest() == known.sha256
    except OSError:
        return True


def _complete(entry: Entry, ledger: Ledger, side: SideFiles) -> None:
    """A run may have been killed after it wrote the row and before the side file."""
    if side.existing == "skip" and side.exists(entry):
        return  # nothing to be read for most of the pictures of a large collection
    caption = side_text(ledger.row(entry.path))
    if not side.is_in_place(entry, caption):
        side.write(entry, caption)


def side_text(row: dict[str, object]) -> str:
    """What stands beside a picture: its caption, or all of them, each on a line."""
    several = row.get("captions")
    return "\n".join(map(str, several)) if isinstance(several, list) else str(row["caption"])
