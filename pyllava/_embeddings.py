"""From pictures to the rows that the language model sees of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from . import _lib
from ._engine import Engine
from ._request import Encode
from .errors import PyllavaError
from .images import ImageSource, content_hash, load_image
from .views import ImageSpec, preprocess, tile_grid

FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """What the language model sees of one image."""

    array: FloatArray
    """float32 [n_tokens, n_embd]"""
    size: tuple[int, int]
    """Width and height of the picture in pixels."""
    key: int
    """Names the rows: equal rows have equal keys, whichever picture, options or model they come from."""

    def __len__(self) -> int:
        return len(self.array)


Images: TypeAlias = "ImageSource | ImageEmbedding | Sequence[ImageSource | ImageEmbedding] | None"
"""What a question may show: one image, several, or none."""


def listed(images: Images) -> list[ImageSource | ImageEmbedding]:
    """Images, however many, as a list."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, with the layout and the number of its rows in the prompt."""

    image: PIL.Image.Image
    spec: ImageSpec
    layout: _lib.Layout
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows


def most_views(spec: ImageSpec | None) -> int:
    """Views of a picture at most; 1 for a model without a projector, which encodes none."""
    if spec is None:
        return 1
    side = spec.image_size
    return 1 + max((w // side * (h // side) for w, h in spec.pinpoints), default=0)


def spec_of(info: _lib.ModelInfo, max_tiles: int | None) -> ImageSpec | None:
    """How the model's views are cut, of at most so many tiles; None for a model without a projector."""
    if not info.has_vision:
        return None
    side = info.image_size
    fitting = tuple(
        (width, height)
        for width, height in info.pinpoints
        if max_tiles is None or width // side * (height // side) <= max_tiles
    )
    return ImageSpec(side, info.image_mean, info.image_std, info.aspect, fitting)


class Pictures:
    """Encodes pictures with the model of an engine; `name` is what messages call it."""

    def __init__(self, engine: Engine, name: str, spec: ImageSpec | None, *, flat: bool) -> None:
        self._engine, self._model, self._name = engine, engine.model, name
        self.spec = spec
        self._flat = flat

    @property
    def most_views(self) -> int:
        """Views of a picture at most."""
        return most_views(self.spec)

    @property
    def most_rows(self) -> int:
        """Rows of a picture, at most; a reduced grid may be 1.1 times as long and wide as the model's limit."""
        if self.spec is None:
            return 0
        info, side = self._model.info, self.spec.image_size
        n_tiles = float(self.most_views - 1)
        if info.anyres_max:
            n_tiles = min(n_tiles, 1.1**2 * info.anyres_max)
        n_lines = math.isqrt(info.n_image_tokens) * max(
            (h // side for _, h in self.spec.pinpoints), default=0
        )
        return math.ceil(info.n_image_tokens * (1 + n_tiles) + n_lines) + 1

    def look_at(self, source: ImageSource | ImageEmbedding, n_images: int = 1) -> Picture | ImageEmbedding:
        """Decodes an image and counts the rows it will take, as one of `n_images` in a prompt.

        LLaVA-OneVision was trained on several images padded and without tiles.
        """
        if isinstance(source, ImageEmbedding):
            return source
        if self.spec is None:
            raise PyllavaError(
                f"{self._name}: an image was given, but there is no projector: name one with mmproj="
            )
        image, spec = load_image(source), self.spec
        if n_images > 1 and self._model.info.anyres_max:
            spec = replace(spec, aspect="pad", pinpoints=())
        layout = _lib.Layout(tile_grid(image.size, spec), image.size, self._flat)
        return Picture(image, spec, layout, self._model.merge_length(layout))

    def encode(
        self, picture: Picture | ImageEmbedding, epoch: object, *, keep: bool = True
    ) -> ImageEmbedding:
        """The rows of a picture; `keep`: they are kept for the next question about it."""
        if isinstance(picture, ImageEmbedding):
            return picture
        content = content_hash(picture.image) + picture.spec.aspect.encode()
        known: ImageEmbedding | None = self._engine.known(content)
        if known is not None:
            return known
        views = preprocess(picture.image, picture.spec)

        def merge(features: FloatArray) -> ImageEmbedding:
            array = self._model.merge(picture.layout, features)
            array.flags.writeable = False
            key = hashlib.blake2b(array.data.cast("B"), digest_size=8).digest()
            return ImageEmbedding(array, picture.image.size, int.from_bytes(key, "little"))

        return self._engine.run(Encode(content, views.pixels, merge, keep=keep), epoch)
