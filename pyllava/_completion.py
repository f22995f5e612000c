"""Conversations and texts answered in the dictionaries of the OpenAI API, as llama-cpp-python gives them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from . import templates
from ._completion_request import (
    ChatOptions,
    ChatRequest,
    LoadImage,
    Messages,
    TextOptions,
    TextRequest,
    conversation,
)
from .answer import Answer, FinishReason, Stream, StreamPiece, TokenLogprob
from .templates import Ids

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .llava import Llava

Dictionary: TypeAlias = dict[str, Any]
_FINISHED: Mapping[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "loop": "length",  # the API has no other word for an answer that was cut
    "timeout": "length",
}


# --- replies ---


class Reply:
    """An answer on its way, and the dictionaries that it becomes."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._n_told = 0  # tokens whose log-probabilities were in a chunk

    def _logprobs(self, piece: str) -> tuple[TokenLogprob, ...]:
        """What there is to tell of the tokens of a piece."""
        found = piece.logprobs if isinstance(piece, StreamPiece) else ()
        self._n_told += len(found)
        return found

    def whole(self, answer: Answer) -> Dictionary:
        raise NotImplementedError

    def opening(self) -> list[Dictionary]:
        """Chunks before the text."""
        raise NotImplementedError

    def piece(self, text: str) -> Dictionary:
        raise NotImplementedError

    def closing(self, answer: Answer) -> list[Dictionary]:
        """Chunks after the text: log-probabilities of tokens that show none, and why the answer ended."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Dictionary]:
        with self.stream:
            yield from self.opening()
            for text in self.stream:
                yield self.piece(text)
            yield from self.closing(self.stream.answer)

    def result(self, stream: bool) -> Dictionary | Iterator[Dictionary]:
        return self.chunks() if stream else self.whole(self.stream.whole())


def _usage(answer: Answer) -> Dictionary:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChatReply(Reply):
    def __init__(self, stream: Stream, model: str) -> None:
        super().__init__(stream)
        self._head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> Dictionary:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": _chat_logprobs(answer.logprobs),
            "finish_reason": _FINISHED[answer.finish_reason],
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}

    def opening(self) -> list[Dictionary]:
        return [self._chunk({"role": "assistant"})]

    def piece(self, text: str) -> Dictionary:
        return self._chunk({"content": str(text)}, self._logprobs(text))

    def closing(self, answer: Answer) -> list[Dictionary]:
        left = answer.logprobs[self._n_told :]
        return [self._chunk({}, left, _FINISHED[answer.finish_reason])]

    def _chunk(
        self, delta: Dictionary, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None
    ) -> Dictionary:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _chat_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def _chat_logprobs(found: Sequence[TokenLogprob]) -> Dictionary | None:
    if not found:
        return None

    def entry(token: TokenLogprob) -> Dictionary:
        return {"token": token.token, "bytes": list(token.bytes), "logprob": token.logprob}

    tokens = [entry(token) | {"top_logprobs": [*map(entry, token.alternatives)]} for token in found]
    return {"content": tokens, "refusal": None}


def chat_reply(
    llava: Llava, messages: Messages, stream: bool, request: ChatRequest, load_image: LoadImage | None = None
) -> ChatReply:
    """The reply to a conversation, which is computed when its stream is read."""
    found = conversation(messages, load_image, is_tiled=llava._pictures.most_views > 1)
    parts = templates.render(llava.template, found.messages, system=found.system)
    sampling = request.in_our_terms(llava.n_ctx)
    answer = llava._answer(parts, found.images, llava.template.stop, sampling, stream)
    return ChatReply(answer, request.model or llava.files.model.name)


@overload
def create_chat_completion(
    llava: Llava, messages: Messages, *, stream: Literal[False] = ..., **options: Unpack[ChatOptions]
) -> Dictionary: ...


@overload
def create_chat_completion(
    llava: Llava, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
) -> Iterator[Dictionary]: ...


@overload
def create_chat_completion(
    llava: Llava, messages: Messages, *, stream: bool, **options: Unpack[ChatOptions]
) -> Dictionary | Iterator[Dictionary]: ...


def create_chat_completion(
    llava: Llava, messages: Messages, *, stream: bool = False, **options: Unpack[ChatOptions]
) -> Dictionary | Iterator[Dictionary]:
    """Answers a conversation: messages, and what comes back, are the dictionaries of the OpenAI API.

    - `messages`: of the system (at most one, the first), the users and the assistant in turns. A user's content is a text or
      a list of texts and pictures: ``{"type": "image_url", "image_url": {"url": URL}}`` with a ``data:`` URL, a path, a
      ``file:`` URL, or bytes or anything else that ask() takes. Nothing is fetched from the web. The pictures of
      a message come before its text, or at its ``<image>`` marks, as in ask().
    - `stream`: True gives an iterator of chunks.
    - The options are those of llama-cpp-python, and so are their defaults, which draw tokens where ask() takes the likeliest:
      temperature=0.2, top_p=0.95, top_k=40, min_p=0.05, max_tokens=None (as many as the context has room for). What is
      not built in (tools, functions, grammars, logits processors) raises ValueError.

    The whole conversation is computed each time, but for what the model still holds of its beginning.
    """
    return chat_reply(llava, messages, stream, ChatRequest(**options)).result(stream)


# --- text ---


class TextReply(Reply):
    def __init__(self, stream: Stream, model: str, prompt: str, *, echo: bool) -> None:
        super().__init__(stream)
        self._at = len(prompt)  # where the next token's text begins
        self._echoed = prompt if echo else ""
        self._head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> Dictionary:
        whole = self._chunk(self._echoed + answer.text, answer.logprobs, _FINISHED[answer.finish_reason])
        return {**whole, "usage": _usage(answer)}

    def opening(self) -> list[Dictionary]:
        return [self.piece(self._echoed)] if self._echoed else []

    def piece(self, text: str) -> Dictionary:
        return self._chunk(str(text), self._logprobs(text))

    def closing(self, answer: Answer) -> list[Dictionary]:
        left = answer.logprobs[self._n_told :]
        return [self._chunk("", left, _FINISHED[answer.finish_reason])]

    def _chunk(
        self, text: str, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None
    ) -> Dictionary:
        found = self._entries(logprobs) if logprobs else None
        choice = {"text": text, "index": 0, "logprobs": found, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}

    def _entries(self, found: Sequence[TokenLogprob]) -> Dictionary:
        offsets = []
        for token in found:
            offsets.append(self._at)
            self._at += len(token.token)
        return {
            "tokens": [token.token for token in found],
            "text_offset": offsets,
            "token_logprobs": [token.logprob for token in found],
            "top_logprobs": [{other.token: other.logprob for other in token.alternatives} for token in found],
        }


def text_reply(llava: Llava, prompt: str | Sequence[int], stream: bool, request: TextRequest) -> TextReply:
    """The continuation of a text, or of token ids, which is computed when its stream is read."""
    if isinstance(prompt, str):
        parts, told = templates.raw(prompt, 0), prompt
    else:
        parts, told = [Ids(tuple(llava._checked(prompt)))], llava.detokenize(prompt)
    sampling = request.sampling(llava.n_ctx, logprobs=request.logprobs)
    answer = llava._answer(parts, (), (), sampling, stream, exact="")
    return TextReply(answer, request.model or llava.files.model.name, told, echo=request.echo)


def create_completion(
    llava: Llava, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[TextOptions]
) -> Dictionary | Iterator[Dictionary]:
    """Goes on with a text as it stands, in which special tokens are recognised, or with token ids."""
    return text_reply(llava, prompt, stream, TextRequest(**options)).result(stream)
