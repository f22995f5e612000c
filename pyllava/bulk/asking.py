"""Entries through a model: what a run does with all of them, and each worker of a cluster with its part."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .inputs import Entry
from .rows import Picture, Rows
from .tables import Row

if TYPE_CHECKING:
    from ..llava import Llava

Answered: TypeAlias = Generator[tuple[Entry, Row], None, None]
"""Entries, each with its row, as they come."""


@dataclass(frozen=True)
class Asking:
    """How pictures are asked about, and what their rows are; workers elsewhere are sent one."""

    model: Mapping[str, Any]
    """The arguments of ``Llava``."""
    rows: Rows
    samples: int
    raw: bool
    system: str | None
    sampling: Mapping[str, Any]

    def answered(self, model: Llava, entries: Iterable[Entry], *, in_order: bool) -> Answered:
        """Each entry and its row. Raises ValueError for a model that sees no pictures."""
        if not model.info.has_vision:
            raise ValueError(
                f"{model.files.model}: no projector, it sees no pictures: name one with --mmproj"
            )
        results = model.batch(
            map(Picture, entries),
            lambda picture: self.rows.texts.prompt_of(picture.entry),
            load=lambda picture: picture.load(),
            samples=self.samples,
            in_order=in_order,
            raw=self.raw,
            system=self.system,
            **self.sampling,
        )
        with contextlib.closing(results):
            for result in results:
                yield result.source.entry, self.rows.row(result.source, result.answers, result.error)
