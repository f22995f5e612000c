"""Which places of a picture an answer depends on: the rows of a window are covered, and the answer is scored again.

Occlusion (Zeiler and Fergus, 2014, section 4.2), of the rows that the language model sees instead of the pixels: the vision
tower runs once, and a window's cost is the prompt from its first covered row on.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from . import _lib
from ._embeddings import ImageEmbedding, Picture
from ._script import Script, Stretch
from .heat_map import HeatMap
from .views import frames

if TYPE_CHECKING:
    from ._scorer import Begun, Question, Scorer

Covered: TypeAlias = Literal["all", "overview", "tiles"]
Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

MOST_WINDOWS = 64
_NAMES = {"all": "image rows", "overview": "the overview's rows", "tiles": "the tiles' rows"}
_COARSE = (
    36  # of fewer cells, a window covers its own alone; of more, those around it too: they tell too much
)


@dataclass(frozen=True)
class Cost:
    """What a heat map takes, told before it is computed."""

    n_windows: int
    n_rows: int
    """Rows that the language model computes for them; a question about the picture takes `n_prompt`."""
    n_prompt: int
    seconds: float
    """As long as this would take by the time of the first window."""

    def __str__(self) -> str:
        return (
            f"{self.n_windows} windows, {self.n_rows} rows to compute ({self.n_rows / self.n_prompt:.0f} times the "
            f"prompt), about {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Places:
    """Where in the picture the patch of each of its rows lies."""

    x: Floats
    """[n_rows] of the patch's centre, as a share of the picture's width; NaN: no patch, or one of padding alone."""
    y: Floats
    is_tile: Mask
    """[n_rows] True: of a tile; False: of the view of the whole picture."""


def places(model: _lib.ModelHandle, picture: Picture) -> Places:
    """Found by merging views whose numbers are the places themselves: so there is no second rule of merging."""
    info, (columns, rows) = model.info, picture.layout.grid
    side = round(info.n_image_tokens**0.5)
    centers = (np.arange(side) + 0.5) / side
    views = np.ones((1 + columns * rows, side, side, info.n_embd), np.float32)
    views[0, :, :, 0], views[0, :, :, 1], views[0, :, :, 2] = 0, centers, centers[:, None]
    for i, view in enumerate(views[1:]):
        view[:, :, 1] = (i % columns + centers) / columns
        view[:, :, 2] = (i // columns + centers[:, None]) / rows
    merged = model.merge(picture.layout, views.reshape(len(views), -1, info.n_embd)).astype(np.float64)
    is_patch = (np.abs(merged[:, 3:] - 1) < 1e-4).all(axis=1)  # the learned newline is no patch
    is_tile = merged[:, 0] > 0.5
    boxes = np.array(frames(picture.image.size, picture.spec))[is_tile.astype(int) * is_patch]
    x = (merged[:, 1] - boxes[:, 0]) / (boxes[:, 2] - boxes[:, 0])
    y = (merged[:, 2] - boxes[:, 1]) / (boxes[:, 3] - boxes[:, 1])
    for part, n_x, n_y in ((is_patch & ~is_tile, 1, 1), (is_patch & is_tile, columns, rows)):
        if not part.any():
            continue
        _seen_though_thin(x, part, 0.5 / (side * n_x) / (boxes[:, 2] - boxes[:, 0]))
        _seen_though_thin(y, part, 0.5 / (side * n_y) / (boxes[:, 3] - boxes[:, 1]))
    outside = ~is_patch | (x < 0) | (x > 1) | (y < 0) | (y > 1)
    x[outside] = y[outside] = np.nan
    return Places(x, y, is_tile & is_patch)


def _seen_though_thin(at: Floats, part: Mask, half: Floats) -> None:
    """A picture between the centres of two patches lies in the middle of those that it touches; `half`: of a patch, in its shares."""
    far = np.abs(at - 0.5)
    if far[part].min() > 0.5:
        at[part & (far < 0.5 + half)] = 0.5


def grid_of(where: Places, size: tuple[int, int], most: int) -> tuple[int, int]:
    """(rows, columns) of the cells that the picture is divided into: about square, at most `most`, none without rows."""
    n_y, n_x = (len(np.unique(np.round(at[~np.isnan(at)], 4))) for at in (where.y, where.x))

    def worth(rows: int) -> float:
        columns = min(n_x, most // rows)
        shape = size[0] * rows / (size[1] * columns)  # of a cell
        return rows * columns * min(shape, 1 / shape)

    rows = max(range(1, min(n_y, most) + 1), key=worth)
    return rows, min(n_x, most // rows)


def window_of(grid: tuple[int, int]) -> int:
    """How many cells a window is wide and high."""
    return 1 if grid[0] * grid[1] < _COARSE else 3


def windows(where: Places, grid: tuple[int, int], covered: Covered) -> list[Mask]:
    """The rows that each cell's window covers, whose middle the cell is."""
    takes = ~np.isnan(where.x)
    if covered != "all":
        takes &= where.is_tile == (covered == "tiles")
    row, column = (
        np.clip(np.floor(np.where(takes, at, 0) * n), 0, n - 1)
        for at, n in zip((where.y, where.x), grid, strict=True)
    )
    reach = window_of(grid) // 2
    return [
        takes & (abs(row - i) <= reach) & (abs(column - j) <= reach)
        for i, j in itertools.product(*map(range, grid))
    ]


class Cover:
    """Rows of a picture, some of them replaced by the mean of those of the same view, or of all tiles, that show it."""

    def __init__(self, rows: ImageEmbedding, where: Places) -> None:
        mean = np.array(rows.array)
        shown = ~np.isnan(where.x)
        for part in (shown & ~where.is_tile, shown & where.is_tile):
            if part.any():
                mean[part] = rows.array[part].mean(axis=0, dtype=np.float64)
        key = hashlib.blake2b(mean.data.cast("B"), digest_size=8).digest()
        self._rows = _lib.Rows(rows.array, rows.key)
        self._mean = _lib.Rows(mean, int.from_bytes(key, "little"))

    def over(self, script: Script, index: int, mask: Mask) -> Script:
        """The script with the rows of its picture number `index` covered."""
        edges = [0, *(int(edge) for edge in np.flatnonzero(np.diff(mask)) + 1), len(mask)]
        spans = [(self._mean if mask[a] else self._rows).part(a, b) for a, b in itertools.pairwise(edges)]
        pictures = [at for at, one in enumerate(script.stretches) if isinstance(one.span, _lib.Rows)]
        at = pictures[index]
        return Script([*script.stretches[:at], *map(Stretch, spans), *script.stretches[at + 1 :]])


def explain(
    scorer: Scorer,
    question: Question,
    answer: str | Sequence[int],
    picture: Picture,
    *,
    index: int = 0,
    covered: Covered = "all",
    most: int = MOST_WINDOWS,
    announce: Callable[[Cost], object] | None = None,
) -> HeatMap:
    """How far the log-probability of `answer` falls where the window around each cell of a picture is covered.

    `picture` is number `index` of the question's. `announce` is called with the cost before all windows but one.
    """
    if covered not in get_args(Covered):
        raise ValueError(f"covered: found {covered!r}, need one of {', '.join(get_args(Covered))}")
    if operator.index(most) < 1:
        raise ValueError(f"windows: found {most}, need 1 or more")
    if len(answer) == 0:
        raise ValueError("the answer is empty, there is nothing to explain: need another one")
    where = places(scorer.model, picture)
    if covered == "tiles" and not where.is_tile.any():
        raise ValueError("covered='tiles': this picture has none, the model sees it whole alone")
    grid = grid_of(where, picture.image.size, most)
    masks = windows(where, grid, covered)
    begun = scorer.begin(question, answer)
    cover = Cover(begun.prompt.images[index], where)
    scripts = [cover.over(begun.prompt.script, index, mask) for mask in masks]
    whole = begun.logprobs([begun.prompt.script])[0]
    found = _in_turn(begun, scripts, announce)
    side, (rows, columns) = window_of(grid), grid
    return HeatMap(
        (whole - found).reshape(grid),
        picture.image,
        question.text,
        begun.text,
        float(whole),
        f"occlusion of {_NAMES[covered]}: windows of {side} x {side} of {rows} x {columns} cells, replaced by the mean",
    )


def _in_turn(begun: Begun, scripts: Sequence[Script], announce: Callable[[Cost], object] | None) -> Floats:
    """The answer's log-probability after each script: those that share most with the prompt as it is come first.

    So each finds its beginning in what one before it has left.
    """
    plain = begun.prompt.script
    shared = np.array([min(script.shared_with(plain), len(plain) - 1) for script in scripts])
    n_rows = int(sum(len(plain) - shared))
    order = np.argsort(-shared, kind="stable")
    started = time.perf_counter()
    found = np.empty(len(scripts))
    found[order[0]] = begun.logprobs([scripts[order[0]]])[0]
    if announce is not None:
        per_row = (time.perf_counter() - started) / (len(plain) - shared[order[0]])
        announce(Cost(len(scripts), n_rows, len(plain), float(per_row * n_rows)))
    found[order[1:]] = begun.logprobs([scripts[i] for i in order[1:]])
    return found
