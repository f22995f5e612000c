"""LLaVA models for the command line tool llm: pictures are attachments, pyllava's ways of sampling are options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llm
from llm.parts import AttachmentPart, TextPart
from pydantic import create_model

import pyllava

KINDS = {f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")}


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """The demo models, and each folder with GGUF files in the folder that $LLM_PYLLAVA_MODELS names."""
    for name in ("demo", "demo-1.6"):
        register(Pyllava(name, name))
    folder = os.environ.get("LLM_PYLLAVA_MODELS")
    if folder:
        for place in sorted({path.parent for path in Path(folder).glob("*/*.gguf")}):
            register(Pyllava(place.name, str(place)))


class Pyllava(llm.Model):
    can_stream = True
    attachment_types = KINDS
    Options = create_model(
        "Options",
        __base__=llm.Options,
        **{
            name: (kind | None, None)
            for name, kind in {
                **dict.fromkeys(("max_tokens", "seed", "top_k", "repeat_last_n"), int),
                **dict.fromkeys(("temperature", "top_p", "min_p", "repeat_penalty", "timeout"), float),
                **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
                **dict.fromkeys(("stop", "start_with"), str),
            }.items()
        },
    )

    def __init__(self, name: str, model: str) -> None:
        self.model_id = f"pyllava/{name}"
        self._model = model
        self._loaded: pyllava.Llava | None = None

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        if self._loaded is None:
            self._loaded = pyllava.Llava(self._model)
        *before, asked = [message for message in prompt.messages if message.role != "system"]
        systems = [text_of(message) for message in prompt.messages if message.role == "system"]
        chat = self._loaded.chat("\n".join(systems) if systems else None)
        for question, answer in zip(before[::2], before[1::2], strict=True):
            chat.add(text_of(question), text_of(answer), images=pictures_of(question))
        options: dict[str, Any] = prompt.options.model_dump(exclude_none=True)
        pieces = chat.ask(text_of(asked), images=pictures_of(asked), stream=True, **options)
        yield from pieces
        usage = pieces.answer.usage
        response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens)


def text_of(message: llm.Message) -> str:
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def pictures_of(message: llm.Message) -> list[bytes]:
    parts = (part for part in message.parts if isinstance(part, AttachmentPart))
    return [part.attachment.content_bytes() for part in parts]
