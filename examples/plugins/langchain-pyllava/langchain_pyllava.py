"""A LangChain chat model that sees: pictures in messages go to a LLaVA model on this machine."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field, PrivateAttr

import pyllava


class ChatPyllava(BaseChatModel):
    """``ChatPyllava(model="models/llava-v1.5-7b", options={"max_tokens": 100})``.

    `model` and `mmproj` are files or a folder as `pyllava.Llava` takes them (None: its demo model), `options` those of
    `Llava.ask`; options of a single call, as ``invoke(messages, temperature=0.5)``, go before them.
    """

    model: str | None = None
    mmproj: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    _llava: pyllava.Llava = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        self._llava = pyllava.Llava(self.model, self.mmproj)

    @property
    def _llm_type(self) -> str:
        return "pyllava"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model or "demo", **self.options}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chat, question, pictures = self._conversation(messages)
        options = {**self.options, **kwargs, **({"stop": stop} if stop else {})}
        with chat.ask(question, images=pictures, stream=True, **options) as pieces:
            for piece in pieces:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        usage, reason = pieces.answer.usage, pieces.answer.finish_reason
        counts = UsageMetadata(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )
        last = AIMessageChunk(
            content="",
            usage_metadata=counts,
            response_metadata={"finish_reason": reason},
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last)

    def _conversation(self, messages: Sequence[BaseMessage]) -> tuple[pyllava.Chat, str, list[bytes]]:
        """What was said before, and the question with its pictures."""
        systems = [message.text for message in messages if isinstance(message, SystemMessage)]
        turns = [message for message in messages if not isinstance(message, SystemMessage)]
        kinds = [HumanMessage if i % 2 == 0 else AIMessage for i in range(len(turns))]
        if len(turns) % 2 == 0 or not all(map(isinstance, turns, kinds)):
            found = ", ".join(message.type for message in turns) or "none"
            raise ValueError(
                f"messages: found {found}; need human and ai in turns, a human one first and last"
            )
        chat = self._llava.chat("\n".join(systems) if systems else None)
        for asked, answered in zip(turns[:-1:2], turns[1::2], strict=True):
            chat.add(asked.text, answered.text, images=pictures_of(asked))
        return chat, turns[-1].text, pictures_of(turns[-1])


def pictures_of(message: BaseMessage) -> list[bytes]:
    """The pictures that a message brings along. An address is refused: nothing is fetched here."""
    found = []
    for block in message.content_blocks:
        if block["type"] == "image" and "base64" in block:
            found.append(base64.b64decode(block["base64"], validate=True))
        elif block["type"] != "text":
            raise ValueError(
                f"a content block of type {block['type']!r}: need text, or an image with its bytes in base64"
            )
    return found
