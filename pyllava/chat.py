"""A conversation with a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from . import templates
from ._embeddings import ImageEmbedding, Images, listed
from ._habits import check_chat_order
from ._prompt import Prompt, question_of
from ._script import Script
from .answer import Answer, Stream
from .sampling import Options, Sampling
from .templates import Message, Part

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .llava import Llava


class Chat:
    """A conversation with a model; made by ``Llava.chat()``.

    Images are encoded once, and what the model still holds of the conversation is not computed again.
    """

    def __init__(self, llava: Llava, system: str | None = None) -> None:
        self._llava = llava
        self.system = system
        self.messages: list[Message] = []
        self._images: list[ImageEmbedding] = []
        self._computed: Script | None = None  # what was computed for the last answer, and how

    @overload
    def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Answer: ...

    @overload
    def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[True], **options: Unpack[Options]
    ) -> Stream: ...

    @overload
    def ask(
        self, prompt: str, *, images: Images = ..., stream: bool, **options: Unpack[Options]
    ) -> Answer | Stream: ...

    def ask(
        self,
        prompt: str,
        *positional: Images,
        images: Images = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | Stream:
        """The next question, with or without new images; options, and where images go, as in ``Llava.ask``.

        The question and its answer become part of the conversation when the answer is complete. Later
        questions are computed after them. An answer's positions stay as they were computed, token by token,
        and are recomputed in the same way if they have been evicted.
        """
        answer = self._asked(prompt, _by_name(positional, images), stream, options)
        return answer if stream else answer.whole()

    def _asked(self, prompt: str, images: Images, stream: bool, options: Options) -> Stream:
        check_chat_order(prompt, images)
        sampling = Sampling(**options)
        known = self._known_images()
        n_known = len(known)
        seen = [*known, *listed(images)]
        question = question_of(prompt, len(seen) - n_known)
        template = self._llava.template
        parts = templates.begun(self._parts(question), sampling.start, template.answer_space)

        def remember(prepared: Prompt, answer: Answer) -> None:
            self._remember(question, answer.text, prepared.images[n_known:])
            self._computed = prepared.script.followed_by(answer.tokens[:-1])

        space = template.answer_space
        return self._llava._answer(
            parts, seen, template.stop, sampling, stream, self._computed, remember, space=space
        )

    def add(self, prompt: str, answer: str, images: Images = None) -> None:
        """Adds a question and its answer without asking: an example, an earlier or a stopped answer."""
        given = listed(images)
        question = question_of(prompt, len(given))
        self._parts(question)  # ValueError for what is no question
        self._remember(question, answer, [self._llava.encode_image(image) for image in given])

    def _parts(self, question: Message) -> list[Part]:
        return templates.render(self._llava.template, [*self.messages, question], system=self.system)

    def _remember(self, question: Message, answer: str, images: Sequence[ImageEmbedding]) -> None:
        self._images = [*self._known_images(), *images]
        self.messages = [*self.messages, question, Message("assistant", answer)]  # takes effect here

    def _known_images(self) -> list[ImageEmbedding]:
        """Images of the messages; after an interrupt there may be images without a message."""
        return self._images[: sum(message.images for message in self.messages)]

    def clear(self) -> None:
        """Forgets the conversation."""
        self.messages, self._images, self._computed = [], [], None


def _by_name(positional: tuple[Images, ...], images: Images) -> Images:
    """Images of Chat.ask() that were given by position, as in earlier versions."""
    if not positional:
        return images
    if len(positional) > 1 or images is not None:
        raise TypeError("Chat.ask() takes a prompt, and images by name: chat.ask(prompt, images=...)")
    warnings.warn(
        "Chat.ask(prompt, images): give images by name, chat.ask(prompt, images=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    return positional[0]
