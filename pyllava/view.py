"""What a model sees of a picture, as a picture: its views, their patches, and what of them becomes rows.

Nothing here computes how a picture is cut or which patches are kept. The pixels are those that the vision tower gets, turned back
into 8 bits; where the picture lies on them is seen by having a white one of its size cut in the same way; and what becomes a row is
read off the model's own merge, which is given the places of rows instead of their embeddings.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from . import _drawing, _lib
from ._embeddings import Picture
from .views import ImageSpec, Views, preprocess

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two behind the end."""
Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ImageView:
    """What a model sees of one picture; made by ``Llava.view()``. In a notebook it shows itself."""

    size: tuple[int, int]
    """Width and height of the picture in pixels."""
    aspect: str
    """"pad": on a square; "squash": made a square; "anyres": the same, and in tiles."""
    views: Pixels
    """uint8 [n_views, S, S, 3]: the pixels that the vision tower gets. The first view shows the whole picture."""
    grid: tuple[int, int]
    """(columns, rows) of the tiles, which are the other views; (0, 0) for none."""
    patch_size: int
    n_side: int
    """Rows a side of each view: as many as patches, or fewer where the projector joins them (MobileVLM)."""
    inside: tuple[Box, Box | None]
    """Where the picture lies on the first view, and on the tiles put together; the rest is border."""
    kept: Box | None
    """The part of the tiles that becomes rows, counted in rows a side of the tiles together; the rest is border."""
    tile_rows: tuple[int, int] | None
    """(columns, rows) of the grid that these become: the same, or fewer where the model reduces large grids."""
    n_newlines: int
    """Rows that end a line of that grid, or all of the picture."""
    n_rows: int
    """Rows of the picture for the language model."""

    @property
    def tiles(self) -> Pixels | None:
        """The tiles put together, uint8 [height, width, 3]."""
        columns, rows = self.grid
        if not columns:
            return None
        side = self.side
        tiles = self.views[1:].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
        together: Pixels = tiles.reshape(rows * side, columns * side, 3)
        return together

    @property
    def side(self) -> int:
        """Pixels a side of each view."""
        return int(self.views.shape[1])

    @property
    def patches(self) -> int:
        """Patches a side of each view; what is left at the right and lower edges is never seen."""
        return self.side // self.patch_size

    def facts(self) -> dict[str, Any]:
        """The numbers, as ``pyllava-cli view --json`` prints them."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "views"}
        return found | {"patches": self.patches, "view_size": self.side, "n_views": len(self.views)}

    def words(self) -> list[str]:
        """The numbers in a few lines."""
        side, n, patches = self.side, self.n_side, self.patches
        how = "centred on a square" if self.aspect == "pad" else "made a square"
        lines = [
            f"picture of {self.size[0]} x {self.size[1]} pixels: {self.n_rows} rows for the language model",
            f"the whole picture, {how}: {side} x {side} pixels, {patches} x {patches} patches, {n * n} rows",
        ]
        if self.kept is None or self.tile_rows is None:
            return lines + ([f"a newline: {self.n_newlines} row"] if self.n_newlines else [])
        (columns, rows), (left, top, right, bottom) = self.grid, self.kept
        width, height = self.tile_rows
        is_reduced = (width, height) != (right - left, bottom - top)
        reduced = f", reduced to {width} x {height}" if is_reduced else ""
        newlines = f" and {self.n_newlines} newlines" if self.n_newlines else ""
        what = "patches" if n == patches else "places"
        kept = f"{right - left} x {bottom - top} of {columns * n} x {rows * n} {what} kept{reduced}"
        lines.append(f"{columns} x {rows} tiles, {kept}: {width * height} rows{newlines}")
        return lines

    def image(self) -> Image.Image:
        """The drawing: the views with their patches, what is border darkened, and the numbers."""
        return _drawn(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the drawing, in the format that the name's suffix says."""
        _drawing.save(self.image(), path)

    def _repr_png_(self) -> bytes:  # what a notebook shows
        return _drawing.encoded(self.image())


# --- the numbers ---


def view_of(picture: Picture, model: _lib.ModelHandle) -> ImageView:
    """What a model sees of a picture."""
    image, spec = picture.image, picture.spec
    views = preprocess(image, spec)
    pixels = _levels(views, spec)
    of_white = _levels(preprocess(Image.new("RGB", image.size, (255, 255, 255)), spec), spec)
    border = (0, 0, 0) if spec.aspect == "anyres" else spec.pad_color
    whole = (0, 0, spec.image_size, spec.image_size)
    first = _box_of(of_white[0], border) if spec.aspect == "pad" else whole
    info = model.info
    n_side = math.isqrt(info.n_image_tokens)
    seen = ImageView(
        image.size, spec.aspect, pixels, views.grid, info.patch_size, n_side, (first, None), None, None, 0, 0
    )
    return _with_rows(seen, of_white, picture.layout, model)


def _levels(views: Views, spec: ImageSpec) -> Pixels:
    """The 8-bit pixels that views were made of, u8 [n, S, S, 3]."""
    values = views.pixels.transpose(0, 2, 3, 1) * np.array(spec.std) + np.array(spec.mean)
    levels: Pixels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    return levels


def _box_of(pixels: Pixels, border: tuple[int, int, int]) -> Box:
    """Where a white picture lies on a border: the pixels that are nearer to white."""
    limit = (np.array(border, np.float64) + 255) / 2
    is_inside = np.all(pixels > limit, axis=-1)
    xs, ys = np.flatnonzero(is_inside.any(axis=0)), np.flatnonzero(is_inside.any(axis=1))
    if not len(xs):  # a hair's breadth, lost in the border
        return 0, 0, 0, 0
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


_MARK = 8192.0  # tells rows of the picture from the newline, whose numbers were learned


def _with_rows(seen: ImageView, of_white: Pixels, layout: _lib.Layout, model: _lib.ModelHandle) -> ImageView:
    """The same view, with what becomes of its patches."""
    n_first = seen.n_side**2
    rows = model.merge(layout, _places(seen.grid, seen.n_side, model.info.n_embd))[n_first:, :3]
    is_patch = np.abs(rows[:, 2] - _MARK) < 1
    n_newlines = int((~is_patch).sum())
    counted = replace(seen, n_rows=n_first + len(rows), n_newlines=n_newlines)
    if is_patch.sum() == 0:
        return counted
    n_lines = n_newlines or len(np.unique(rows[:, 1]))
    grid = rows[is_patch].reshape(n_lines, -1, 3)
    canvas = replace(seen, views=of_white).tiles
    assert canvas is not None
    return replace(
        counted,
        kept=_extent(grid[..., :2]),
        tile_rows=(grid.shape[1], n_lines),
        inside=(seen.inside[0], _box_of(canvas, (0, 0, 0))),
    )


def _places(grid: tuple[int, int], n: int, n_embd: int) -> npt.NDArray[np.float32]:
    """Embeddings of views whose first numbers tell where in the tiles put together a row has its centre: x, y, _MARK."""
    columns, n_tiles = max(grid[0], 1), grid[0] * grid[1]
    places = np.zeros((1 + n_tiles, n * n, n_embd), np.float32)  # pages that stay zero take no memory
    y, x = np.divmod(np.arange(n * n), n)
    for tile in range(n_tiles):
        row, column = divmod(tile, columns)
        places[1 + tile, :, 0] = column * n + x + 0.5
        places[1 + tile, :, 1] = row * n + y + 0.5
        places[1 + tile, :, 2] = _MARK
    return places


def _extent(centres: npt.NDArray[np.float32]) -> Box:
    """What a grid of centres [rows, columns, 2] covers: half a step more on each side. Those of a reduced grid are wider apart."""
    n = np.array(centres.shape[1::-1])
    first, last = centres[0, 0].astype(np.float64), centres[-1, -1].astype(np.float64)
    steps = (last - first) / np.maximum(n - 1, 1)
    steps = np.where(n > 1, steps, max(1.0, steps.max()))
    left, top = np.rint(first - steps / 2).astype(int).tolist()
    right, bottom = np.rint(last + steps / 2).astype(int).tolist()
    return left, top, right, bottom


# --- the drawing ---

_PANEL = 672  # pixels a side that a small view is enlarged to, by a whole number
_GAP, _LINE, _TEXT = 20, 22, 17
_INK, _PAPER = (30, 30, 30), (250, 250, 250)
_PICTURE, _TILE = (20, 110, 235, 255), (240, 120, 10, 255)
_SHIFT = 40  # levels that the edges of patches are darker, or lighter where the picture is dark
_LEGEND = {
    "the picture; around it is border": _PICTURE[:3],
    "edges of tiles": _TILE[:3],
    "hatched: becomes no row": (128, 128, 128),
}


def _drawn(view: ImageView) -> Image.Image:
    panels = [_first_panel(view)] + ([_tiles_panel(view)] if view.tiles is not None else [])
    lines, font = view.words(), ImageFont.load_default(_TEXT)
    is_wide = panels[-1].width > 1.5 * panels[-1].height
    width = max(p.width for p in panels) if is_wide else sum(p.width + _GAP for p in panels) - _GAP
    width = max(width, *(math.ceil(font.getlength(line)) for line in [*lines, *_LEGEND]))
    height = sum(p.height + _GAP for p in panels) if is_wide else max(p.height for p in panels) + _GAP
    legend = [name for name in _LEGEND if _is_shown(name, view)]
    text = _LINE * (len(lines) + len(legend)) + _GAP
    sheet = Image.new("RGB", (width + 2 * _GAP, height + text + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    x, y = _GAP, _GAP
    for line in lines:
        draw.text((x, y), line, _INK, font)
        y += _LINE
    y += _GAP // 2
    for panel in panels:
        sheet.paste(panel, (x, y))
        x, y = (x, y + panel.height + _GAP) if is_wide else (x + panel.width + _GAP, y)
    y = sheet.height - _LINE * len(legend) - _GAP // 2
    for name in legend:
        draw.rectangle((_GAP, y + 3, _GAP + 12, y + 15), fill=_LEGEND[name])
        draw.text((_GAP + 20, y), name, _INK, font)
        y += _LINE
    return sheet


def _is_shown(name: str, view: ImageView) -> bool:
    if name == "edges of tiles":
        return view.tiles is not None
    if name.startswith("hatched"):
        return bool(_unseen(view, (1, 1)) or (view.tiles is not None and _unseen(view, view.grid, view.kept)))
    return view.aspect != "squash"


def _first_panel(view: ImageView) -> Image.Image:
    panel = _Panel(view.views[0], view)
    panel.hatch(_unseen(view, (1, 1)))
    panel.outline(view.inside[0], _PICTURE)
    return panel.image


def _tiles_panel(view: ImageView) -> Image.Image:
    assert view.tiles is not None
    panel = _Panel(view.tiles, view)
    panel.hatch(_unseen(view, view.grid, view.kept))
    panel.tiles(view.grid)
    if view.inside[1] is not None:
        panel.outline(view.inside[1], _PICTURE)
    return panel.image


def _unseen(view: ImageView, grid: tuple[int, int], kept: Box | None = None) -> list[Box]:
    """Parts of views side by side that no row shows: what no whole patch covers, and patches that are not kept."""
    side, covered, n = view.side, view.patches * view.patch_size, view.n_side
    (columns, rows), found = grid, []
    width, height = columns * side, rows * side
    if covered < side:
        found += [(i * side + covered, 0, (i + 1) * side, height) for i in range(columns)]
        found += [(0, i * side + covered, width, (i + 1) * side) for i in range(rows)]
    if kept is not None:
        left, top, right, bottom = (at // n * side + at % n * covered // n for at in kept)
        found += [(0, 0, left, height), (right, 0, width, height)]
        found += [(left, 0, right, top), (left, bottom, right, height)]
    return [box for box in found if box[0] < box[2] and box[1] < box[3]]


class _Panel:
    """Pixels, enlarged, with lines over them; boxes are given in the pixels of the model."""

    def __init__(self, pixels: Pixels, view: ImageView) -> None:
        side, size = view.side, view.patch_size
        self._scale = max(1, round(_PANEL / max(pixels.shape[:2])))
        shown = pixels.repeat(self._scale, axis=0).repeat(self._scale, axis=1).astype(np.int16)
        y, x = (np.arange(n) % (side * self._scale) % (size * self._scale) == 0 for n in shown.shape[:2])
        edges = y[:, None] | x
        is_light = shown[edges].mean(axis=-1, keepdims=True) > 96
        shown[edges] += np.where(is_light, -_SHIFT, _SHIFT).astype(np.int16)
        self.image = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def _scaled(self, box: Box) -> tuple[int, int, int, int]:
        left, top, right, bottom = (at * self._scale for at in box)
        return left, top, right - 1, bottom - 1

    def tiles(self, grid: tuple[int, int]) -> None:
        (columns, rows), (width, height) = grid, self.image.size
        for i in range(1, columns):
            self._draw.line((i * width // columns, 0, i * width // columns, height), fill=_TILE, width=3)
        for i in range(1, rows):
            self._draw.line((0, i * height // rows, width, i * height // rows), fill=_TILE, width=3)

    def outline(self, box: Box, color: tuple[int, int, int, int]) -> None:
        if box[0] < box[2]:
            self._draw.rectangle(self._scaled(box), outline=color, width=3)

    def hatch(self, boxes: list[Box]) -> None:
        """Darkens boxes, with diagonal lines, which are seen on black, too."""
        for box in boxes:
            left, top, right, bottom = self._scaled(box)
            part = Image.new("RGBA", (right - left + 1, bottom - top + 1), (70, 70, 70, 150))
            lines = ImageDraw.Draw(part)
            for x in range(-part.height, part.width, 10):
                lines.line((x, part.height, x + part.height, 0), fill=(190, 190, 190, 170))
            self.image.paste(part, (left, top), part)
