"""How many positions a session has, for one answer and for all of them together: as many as memory holds, within limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

KvCells: TypeAlias = "int | Literal['pictures'] | None"
"""What a user says of all answers: a number, enough for questions about pictures, or nothing."""
USUAL_CTX = 4096
BESIDE_A_PICTURE = 1024  # positions


@dataclass(frozen=True)
class Room:
    """Positions of a session."""

    n_ctx: int
    """For one answer and its prompt."""
    kv_cells: int
    """For all answers at once, and for what is kept of earlier ones."""
    n_cells: int
    """Of the KV cache: those beyond `kv_cells` are for an answer that is alone and needs more."""
    is_least: bool
    """There is no smaller one to try."""


def rooms(
    n_ctx: int | None, kv_cells: KvCells, *, trained: int, on_host: bool, n_parallel: int, n_picture: int
) -> Iterator[Room]:
    """Rooms to try, the largest first: `n_ctx` and `kv_cells` if they are given, else halved while memory does not hold it.

    `trained`: positions that the model was trained for. `on_host`: the cache's pages are taken as they are used. `n_picture`: rows
    of a picture at most.
    """
    least = min(trained, USUAL_CTX) if n_ctx is None else n_ctx
    question = n_picture + BESIDE_A_PICTURE
    grows = n_ctx is None and not isinstance(kv_cells, int)
    ctx = max(least, trained if on_host else min(trained, question)) if grows else least
    cells = least if kv_cells is None or kv_cells == "pictures" else kv_cells
    least_cells = cells
    if kv_cells == "pictures":
        cells = max(least, n_parallel * min(ctx, question))
    while True:
        is_least = ctx <= least and cells <= least_cells
        yield Room(ctx, cells, cells if isinstance(kv_cells, int) else max(ctx, cells), is_least)
        if is_least:
            return
        ctx, cells = max(least, ctx // 2), max(least_cells, cells // 2)
