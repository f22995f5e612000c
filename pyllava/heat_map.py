"""A heat map of a picture: its numbers, and how it is drawn."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from . import _drawing

Floats: TypeAlias = npt.NDArray[np.float64]

_LONGEST, _SHORTEST = 768, 384  # pixels of the longer side of what is drawn
_LEAST, _MOST = 0.06, 0.72  # how much of the picture the colours hide
_COLORS = np.array(  # from no effect to the largest: pale to dark, seen on light and dark greys
    [[255, 245, 170], [254, 190, 80], [240, 90, 35], [170, 0, 40]], np.float64
)
_MARGIN, _TEXT = 8, 14
_LONG_TEXT = 500  # characters, of which no more is looked at
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """How much an answer depends on each place of a picture; a notebook shows it drawn."""

    array: Floats
    """float64 [rows, columns], top row first: how far the answer's log-probability falls where the window around the cell
    is covered. The cells divide the picture evenly; below 0, the answer becomes likelier."""
    picture: Image.Image = field(repr=False)
    question: str
    answer: str
    logprob: float
    """Of the answer while nothing is covered."""
    method: str
    """In words; it stands in what is drawn."""

    @property
    def peak(self) -> tuple[int, int]:
        """(row, column) of the largest value."""
        row, column = np.unravel_index(np.argmax(self.array), self.array.shape)
        return int(row), int(column)

    @property
    def peak_box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the peak's cell in pixels of the picture."""
        (row, column), (rows, columns) = self.peak, self.array.shape
        width, height = self.picture.size
        return (
            column * width / columns,
            row * height / rows,
            (column + 1) * width / columns,
            (row + 1) * height / rows,
        )

    def image(self) -> Image.Image:
        """The heat map over the picture, with question, answer, method and scale below; RGB."""
        shown = self._overlay()
        words = [f"Q: {self.question}", f"A: {self.answer} ({self._share()})", self.method, self._scale()]
        font = ImageFont.load_default(size=_TEXT)
        lines = [line for text in words for line in _wrapped(text, font, shown.width - 2 * _MARGIN)]
        height = len(lines) * (_TEXT + 4) + 2 * _MARGIN
        canvas = Image.new("RGB", (shown.width, shown.height + height), _PAPER)
        canvas.paste(shown)
        draw = ImageDraw.Draw(canvas)
        for number, line in enumerate(lines):
            draw.text((_MARGIN, shown.height + _MARGIN + number * (_TEXT + 4)), line, _INK, font)
        return canvas

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `image()`, in the format that the name's ending tells: the file appears whole or not at all."""
        _drawing.save(self.image(), path)

    def _repr_png_(self) -> bytes:
        return _drawing.encoded(self.image())

    def _overlay(self) -> Image.Image:
        longest = max(self.picture.size)
        scale = min(max(longest, _SHORTEST), _LONGEST) / longest
        size = max(1, round(self.picture.width * scale)), max(1, round(self.picture.height * scale))
        picture = np.asarray(self.picture.resize(size, Image.Resampling.LANCZOS), np.float64)
        grey = picture @ (0.299, 0.587, 0.114)  # so that the only colours are those of the map
        top = self.array.max()
        heat = np.clip(self.array / top, 0, 1) if top > 0 else np.zeros_like(self.array)
        smooth = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        share = np.clip(np.asarray(smooth, np.float64), 0, 1)[..., None]
        at = share * (len(_COLORS) - 1)
        low = np.minimum(at.astype(int), len(_COLORS) - 2)
        color = _COLORS[low[..., 0]] + (at - low) * (_COLORS[low[..., 0] + 1] - _COLORS[low[..., 0]])
        hidden = _LEAST + (_MOST - _LEAST) * share
        mixed = (1 - hidden) * grey[..., None] + hidden * color
        return Image.fromarray(np.rint(np.clip(mixed, 0, 255)).astype(np.uint8))

    def _share(self) -> str:
        share = float(np.exp(self.logprob))
        return f"probability {share:.3g}" if share < 0.999 else "probability above 0.999"

    def _scale(self) -> str:
        top = float(self.array.max())
        if top <= 0:
            return "no window makes the answer less likely"
        return f"darkest: log-probability falls by {top:.3g} where the window around it is covered"


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit, at most three of them; a long word is broken."""
    lines, line = [], ""
    words = " ".join(text[:_LONG_TEXT].split())
    for word in re.findall(r" ?[^ ]{1,24}", words):
        if line and font.getlength(line + word) > width:
            lines.append(line)
            line = word.lstrip()
        else:
            line += word
    lines.append(line)
    return lines if len(lines) <= 3 and len(text) <= _LONG_TEXT else [*lines[:2], f"{lines[2][:-3]}..."]
