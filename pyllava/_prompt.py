"""From a question to what the model computes: parts of a template, token ids, image rows."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from . import _lib, templates
from ._embeddings import ImageEmbedding, Pictures
from ._lib.values import number_text
from ._request import Epoch
from ._script import Script, Stretch
from .answer import Usage
from .errors import ContextOverflowError
from .images import ImageSource
from .templates import Ids, ImageMark, Message, Part, Template, Text

_LONG_TEXT = 1 << 16  # bytes


@dataclass
class Prompt:
    """A prompt ready to be computed, and what it took to get there."""

    script: Script
    images: list[ImageEmbedding]
    encode_seconds: float
    n_text: int = field(init=False)
    n_image: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_image = sum(map(len, self.images))
        self.n_text = len(self.script) - self.n_image

    def __len__(self) -> int:
        return len(self.script)

    def usage(self, cached: int = 0, completion: int = 0, forced: int = 0) -> Usage:
        return Usage(self.n_image, self.n_text, cached, completion, tuple(map(len, self.images)), forced)


class Prompts:
    """Makes prompts for one model, template and context."""

    def __init__(self, model: _lib.ModelHandle, pictures: Pictures, template: Template, n_ctx: int) -> None:
        self._model, self._pictures = model, pictures
        self.template = template
        self._n_ctx = n_ctx

    def parts(self, prompt: str, n_images: int, raw: bool, system: str | None) -> list[Part]:
        """The parts of a question, in the template or as it stands."""
        question = question_of(prompt, n_images)
        if not isinstance(system, str | None):
            raise TypeError(f"system: found {type(system).__name__}, need a text, or None")
        if raw:
            return templates.raw(prompt, n_images)
        return templates.render(self.template, [question], system=system)

    def tokenized(self, parts: Sequence[Part]) -> list[list[int] | ImageMark]:
        """Texts between images become ids, each by itself as in training; the first begins with BOS."""
        found: list[list[int] | ImageMark] = []
        add_bos = self._model.info.add_bos and not (parts and isinstance(parts[0], Ids))
        at = 0
        while at < len(parts) or add_bos:
            stretch = []
            while at < len(parts) and isinstance(part := parts[at], Text):
                stretch.append(part)
                at += 1
            if stretch or add_bos:
                found.append(self._tokenize_stretch(stretch, add_bos))
            add_bos = False
            if at < len(parts) and not isinstance(part := parts[at], Text):
                found.append(part if isinstance(part, ImageMark) else [*part.ids])
                at += 1
        return found

    def _tokenize_stretch(self, stretch: Sequence[Text], add_bos: bool) -> list[int]:
        plain, at = [], 0
        for part in stretch:
            end = at + len(part.text.encode())
            if not part.special:
                plain.append((at, end))
            at = end
        if at > _LONG_TEXT and at > self._n_ctx * self._longest_piece():  # before tokenizing for minutes
            raise ContextOverflowError(f"prompt of {at} bytes cannot fit in n_ctx={self._n_ctx}: shorten it")
        return self._model.tokenize("".join(part.text for part in stretch), plain=plain, add_bos=add_bos)

    def _longest_piece(self) -> int:
        return max(
            len(self._model.piece(token, with_special=True)) for token in range(self._model.info.n_vocab)
        )

    def prepare(
        self,
        texts: Sequence[list[int] | ImageMark],
        images: Sequence[ImageSource | ImageEmbedding],
        most: int,
        epoch: Epoch,
    ) -> Prompt:
        """Encodes the images and puts them in their places; more than `most` positions are refused."""
        marks = [text.index for text in texts if isinstance(text, ImageMark)]
        if sorted(marks) != list(range(len(images))):
            raise ValueError(f"{len(images)} images for {len(marks)} places in the prompt: {marks}")
        n_text = sum(len(item) for item in texts if isinstance(item, list))
        pictures = [self._pictures.look_at(image, len(images)) for image in images]
        self._check_room(n_text, [len(picture) for picture in pictures], most)
        started = time.perf_counter()
        seen = [self._pictures.encode(picture, epoch) for picture in pictures]
        seconds = time.perf_counter() - started
        stretches = []
        for item in texts:
            if isinstance(item, ImageMark):
                rows = seen[item.index]
                stretches.append(Stretch(_lib.Rows(rows.array, rows.key)))
            else:
                stretches.append(Stretch(_lib.Tokens(item)))
        return Prompt(Script(stretches), seen, seconds)

    def _check_room(self, n_text: int, rows: Sequence[int], most: int) -> None:
        n_image = sum(rows)
        need = n_text + n_image
        if need <= most:
            return
        ways = []
        trained = self._model.info.n_ctx_train
        if need < trained:
            ways.append(f"raise n_ctx (-c) to {need + 1} or more, {trained} at most")
        if n_image and self._pictures.most_views > 1:
            ways.append("show fewer tiles of an image (image_max_tiles, --image-max-tiles)")
        if len(rows) > 1 and (n_image >= n_text or n_image > most):
            n_fit = max(most - n_text, 0) // max(rows)
            ways.append(f"give fewer images ({len(rows)} given" + (f", {n_fit} fit)" if n_fit else ")"))
        if n_text > n_image or n_text > most or not ways:
            ways.append("shorten the prompt")
        raise ContextOverflowError(
            f"prompt of {need} positions ({n_image} of images, {n_text} of text) does not fit in "
            f"n_ctx={self._n_ctx} with room for an answer: {', or '.join(ways)}"
        )


def stretches_of(prompt: Sequence[int | ImageMark]) -> list[list[int] | ImageMark]:
    """Joins consecutive ids."""
    found: list[list[int] | ImageMark] = []
    for item in prompt:
        if isinstance(item, ImageMark):
            found.append(item)
        elif found and isinstance(found[-1], list):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def checked_ids(ids: Sequence[int], n_vocab: int, where: str = "") -> list[int]:
    """Token ids that a vocabulary has; `where` they stand is told, if it is not."""
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Iterable):
        raise TypeError(f"{where}found {ids!r:.80}, need token ids")
    found = []
    for i, token in enumerate(ids):
        try:
            number = operator.index(token)
        except TypeError:
            raise TypeError(f"{where}token {i}: found {token!r:.80}, need a whole number") from None
        if not 0 <= number < n_vocab:
            raise ValueError(f"{where}token {i}: found {number_text(number)}, need 0..{n_vocab - 1}")
        found.append(number)
    return found


def joined(texts: Sequence[list[int] | ImageMark]) -> list[int | ImageMark]:
    """The inverse: one id or mark after the other."""
    found: list[int | ImageMark] = []
    for item in texts:
        found += [item] if isinstance(item, ImageMark) else item
    return found


def question_of(prompt: str, n_images: int) -> Message:
    """A user's message."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: found {type(prompt).__name__}, need a text")
    return Message("user", prompt, n_images)
