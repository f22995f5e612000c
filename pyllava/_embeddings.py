"""From pictures to the rows that the language model sees of them."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from . import _embedding_file, _lib
from ._engine import Engine
from ._projector import Projector
from ._request import Encode, Epoch
from .errors import ImageError, ModelMismatchError, PyllavaError
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
    layout: _lib.Layout | None = None
    """How the rows lie in the picture; None where that is not known, as in one made by hand."""
    projector: Projector | None = None
    """What made the rows: only a model with the same projector takes them. None: any model of their width does."""

    def __len__(self) -> int:
        return len(self.array)

    def pooled(self) -> FloatArray:
        """The mean of the rows, float32 [n_embd]: one vector for the picture, in the space of the language model's inputs.

        Near vectors (by cosine) are alike for this model. It is no embedding that texts could be compared with, as CLIP's is.
        """
        mean: FloatArray = self.array.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows, layout and what made them into a file: ``.safetensors`` or ``.npz``, by its name."""
        size = _pair([operator.index(side) for side in self.size], 1)
        about: dict[str, Any] = {"kind": _KIND, "version": 1, "size": size, "layout": None}
        if self.layout is not None:
            about["layout"] = {"grid": list(self.layout.grid), "flat": self.layout.flat}
        about["projector"] = vars(self.projector) if self.projector is not None else None
        _embedding_file.write(Path(path), self.array, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageEmbedding:
        """What save() has written. The file may come from anywhere: it is checked, and nothing in it is run.

        Raises FileNotFoundError, or ImageError for what is no such file, or damaged.
        """
        array, about = _embedding_file.read(Path(path))
        try:
            return _loaded(array, about)
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(f"{os.fspath(path)}: no image embedding: {error}") from None


_KIND = "pyllava image embedding"
_DIGEST_DIGITS = 32


def _loaded(array: FloatArray, about: dict[str, Any]) -> ImageEmbedding:
    """The key is made anew: what a file says must not pass for another picture's rows."""
    if about["kind"] != _KIND or about["version"] != 1:
        raise ValueError(
            f"found {str(about['kind'])[:40]!r}, version {about['version']!r:.20}, need version 1"
        )
    size, layout, projector = _pair(about["size"], 1), about["layout"], about["projector"]
    found = None if layout is None else _lib.Layout(_pair(layout["grid"], 0), size, bool(layout["flat"]))
    maker = None if projector is None else Projector(str(projector["name"])[:200], str(projector["digest"]))
    if maker is not None and len(maker.digest) != _DIGEST_DIGITS:
        raise ValueError(f"projector: a digest of {len(maker.digest)} digits, need {_DIGEST_DIGITS}")
    return ImageEmbedding(_frozen(array), size, _key_of(array), found, maker)


def _pair(values: Any, least: int) -> tuple[int, int]:
    first, second = values
    if not all(type(value) is int and least <= value < 1 << 31 for value in (first, second)):
        raise ValueError(f"found {str(values)[:40]}, need two numbers from {least} on")
    return first, second


def _frozen(array: FloatArray) -> FloatArray:
    array.flags.writeable = False
    return array


def _key_of(array: FloatArray) -> int:
    digest = hashlib.blake2b(array.data.cast("B"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


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

    def __init__(
        self, engine: Engine, name: str, spec: ImageSpec | None, projector: Projector | None, *, flat: bool
    ) -> None:
        self._engine, self._model, self._name = engine, engine.model, name
        self.spec = spec
        self._projector = projector
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
            self._check(source)
            return source
        return self.picture(source, n_images)

    def picture(self, source: ImageSource, n_images: int = 1) -> Picture:
        """The same of what is no embedding."""
        if self.spec is None:
            raise PyllavaError(
                f"{self._name}: an image was given, but there is no projector: name one with --mmproj, in Python mmproj="
            )
        image, spec = load_image(source), self.spec
        if n_images > 1 and self._model.info.anyres_max:
            spec = replace(spec, aspect="pad", pinpoints=())
        layout = _lib.Layout(tile_grid(image.size, spec), image.size, self._flat)
        return Picture(image, spec, layout, self._model.merge_length(layout))

    def _check(self, embedding: ImageEmbedding) -> None:
        """Raises where the rows are another model's: it would take them for a picture, and answer nonsense."""
        width, shape = self._model.info.n_embd, embedding.array.shape
        if embedding.projector not in (None, self._projector):
            ours = (
                f"that of {self._name} is {self._projector}" if self._projector else f"{self._name} has none"
            )
            raise ModelMismatchError(
                f"image embedding of the projector {embedding.projector}: {ours}; encode the picture with this model"
            )
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise ModelMismatchError(
                f"image embedding of shape {shape}: {self._name} takes (n, {width}), n from 1 on"
            )

    def encode(self, picture: Picture | ImageEmbedding, epoch: Epoch, *, keep: bool = True) -> ImageEmbedding:
        """The rows of a picture; `keep`: they are kept for the next question about it."""
        if isinstance(picture, ImageEmbedding):
            return picture
        content = b""
        if keep or self._engine.keeps_embeddings:
            content = content_hash(picture.image) + picture.spec.aspect.encode()
        known: ImageEmbedding | None = self._engine.known(content)
        if known is not None:
            return known
        views = preprocess(picture.image, picture.spec)

        def merge(features: FloatArray) -> ImageEmbedding:
            array = _frozen(self._model.merge(picture.layout, features))
            size = picture.image.size
            return ImageEmbedding(array, size, _key_of(array), picture.layout, self._projector)

        return self._engine.run(Encode(content, views.pixels, merge, keep=keep), epoch)
