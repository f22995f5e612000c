"""Models for asyncio: what waits is awaited, and a task that is cancelled takes its answer with it.

What the model computes needs no thread: the engine tells the event loop when text has come. Loading, and what comes before
an answer (reading and encoding pictures, tokens), run on a few threads that belong to the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ._completion import Dictionary, Reply, chat_reply
from ._completion_request import ChatOptions, ChatRequest, Messages
from ._embeddings import ImageEmbedding, Images
from ._engine import own_epoch
from ._lib.values import is_false
from ._request import Epoch
from ._scheduler import Stats
from ._scorer import Loglikelihood, Scores
from .answer import Answer, Stream, Usage
from .batch import Result
from .chat import Chat
from .errors import ClosedError
from .heat_map import HeatMap
from .images import ImageSource
from .llava import Llava
from .sampling import Options
from .templates import ImageMark, Message
from .view import ImageView

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")
FloatArray: TypeAlias = npt.NDArray[np.float32]
_MOMENT = 0.002  # seconds between two looks whether the engine has ended
_LOOK = 1.0  # seconds after which a reader looks by itself whether the model is still there
_AHEAD = 2  # threads, and questions with their pictures in memory, for each answer under way


class AsyncStream:
    """An answer in the making: ``async for`` gives its pieces of text. As `Stream`, but for what is awaited.

    A task that is cancelled while it waits for a piece ends the answer.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._came = self._loop.create_future()
        stream.never_waits(functools.partial(_notify, weakref.ref(self)))

    @property
    def usage(self) -> Usage:
        return self._stream.usage

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises ValueError before the last piece has been taken."""
        return self._stream.answer

    def notify(self) -> None:
        """Wakes the task that waits for a piece; from any thread, also if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self._came.done():
            self._came.set_result(None)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            self._came = self._loop.create_future()  # before it looks: what comes after that is told
            try:
                piece = next(self._stream)
            except StopIteration:
                raise StopAsyncIteration from None
            if piece:
                return piece
            try:
                await asyncio.wait([self._came], timeout=_LOOK)
            except asyncio.CancelledError:
                self._stream.close()
                raise

    async def whole(self) -> Answer:
        """Takes all that is left, and gives the whole answer."""
        async for _ in self:
            pass
        return self.answer

    async def aclose(self) -> None:
        """Ends the stream; if it is unfinished, it has no `answer`. A second call does nothing."""
        self._stream.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stream.close()


def _notify(stream: weakref.ref[AsyncStream]) -> None:
    """Called by the engine, which must not keep a stream alive that nobody reads any more."""
    if (reader := stream()) is not None:
        reader.notify()


class AsyncLlava:
    """A `Llava` for one event loop, with the same parameters and methods.

    It is loaded by ``async with``, by load(), or by the first call. Tasks ask at the same time as many questions as they
    like: their answers share the engine's steps, n_parallel at once. Cancelling a task ends what is computed for it.
    """

    def __init__(self, *arguments: Any, **by_name: Any) -> None:
        """The arguments of ``Llava``, which are looked at when it is loaded."""
        self._make: Callable[..., Llava] = Llava
        self._arguments, self._by_name = arguments, by_name
        self._life = Epoch()
        self._loading: asyncio.Task[Llava] | None = None
        self._llava: Llava | None = None
        n_at_once = max(1, _AHEAD * int(by_name.get("n_parallel", 4)))
        self._pool = ThreadPoolExecutor(n_at_once, thread_name_prefix="pyllava-async")
        self._room = asyncio.Semaphore(n_at_once)

    @classmethod
    def from_pretrained(cls, repo: str, **options: Any) -> Self:
        """As ``Llava.from_pretrained``: fetched, if need be, when it is loaded."""
        model = cls(repo, **options)
        model._make = Llava.from_pretrained
        return model

    # ------------------------------------------------------------------------------------------ life

    async def load(self) -> Llava:
        """The model itself, for what does not wait: tokenize(), info, n_ctx, devices."""
        if self._life.is_over:
            raise ClosedError("the model was closed")
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)  # other tasks wait for it, too

    async def _load(self) -> Llava:
        told = self._by_name.get("progress")
        life = self._life

        def progress(stage: str, fraction: float) -> bool:
            wanted = told is None or not is_false(told(stage, fraction))
            return wanted and not life.is_over

        options = {**self._by_name, "progress": progress}
        loop = asyncio.get_running_loop()
        self._llava = await loop.run_in_executor(self._pool, lambda: self._make(*self._arguments, **options))
        return self._llava

    async def close(self) -> None:
        """Frees the model; calls of other tasks are ended first. A second call does nothing."""
        self._life.end()
        self._pool.shutdown(wait=False)
        if self._loading is not None and self._llava is None:
            with contextlib.suppress(Exception):  # those who waited for it know
                await asyncio.shield(self._loading)
        if self._llava is not None:
            engine = self._llava._engine
            engine.close(0)
            while not engine.has_ended:
                await asyncio.sleep(_MOMENT)

    async def __aenter__(self) -> Self:
        try:
            await self.load()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def cancel(self) -> None:
        """Ends the calls of all tasks with GenerationCancelled."""
        if self._llava is not None:
            self._llava.cancel()

    def stats(self) -> Stats:
        """What the model is doing now, and what it has done so far. Raises ValueError before it is loaded."""
        if self._llava is None:
            raise ValueError("the model is not loaded: await load() first")
        return self._llava.stats()

    def _place(self, stream: bool) -> AbstractAsyncContextManager[Any]:
        """A whole answer's place: few questions are in memory at a time. A stream's reader may never come."""
        return contextlib.nullcontext() if stream else self._room

    async def _call(self, function: Callable[[Llava], T]) -> T:
        """A function in a thread. If the task is cancelled, so are the jobs of the function."""
        llava = await self.load()
        return await self._within(llava, Epoch(llava._engine.epoch()), lambda: function(llava))

    async def _within(self, llava: Llava, epoch: Epoch, function: Callable[[], T]) -> T:
        llava._engine.check()
        context = contextvars.copy_context()
        context.run(own_epoch.set, epoch)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, context.run, function)
        except asyncio.CancelledError:
            llava._engine.end(epoch)
            raise

    # ------------------------------------------------------------------------------------------ answers

    @overload
    async def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: Literal[False] = ...,
        raw: bool = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    async def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: Literal[True],
        raw: bool = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> AsyncStream: ...

    @overload
    async def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: bool,
        raw: bool = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Answer | AsyncStream: ...

    async def ask(
        self,
        images: Images = None,
        prompt: str | None = None,
        *,
        stream: bool = False,
        raw: bool = False,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer | AsyncStream:
        """As ``Llava.ask``; `stream`: True gives an AsyncStream."""
        async with self._place(stream):
            asked = await self._call(lambda llava: llava._asked(images, prompt, stream, raw, system, options))
            answer = AsyncStream(asked)
            return answer if stream else await answer.whole()

    async def batch(
        self, sources: Iterable[T], prompt: str | Callable[[T], str], **options: Any
    ) -> AsyncGenerator[Result[T], None]:
        """As ``Llava.batch``: an asynchronous generator of a Result for each source."""
        llava = await self.load()
        epoch = Epoch(llava._engine.epoch())
        results = await self._within(llava, epoch, lambda: llava.batch(sources, prompt, **options))
        try:
            while (result := await self._within(llava, epoch, lambda: next(results, None))) is not None:
                yield result
        finally:
            llava._engine.end(epoch)
            with contextlib.suppress(ValueError):  # a thread is still in it, and is about to leave it
                results.close()

    @overload
    async def create_chat_completion(
        self, messages: Messages, *, stream: Literal[False] = ..., **options: Unpack[ChatOptions]
    ) -> Dictionary: ...

    @overload
    async def create_chat_completion(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[Dictionary, None]: ...

    @overload
    async def create_chat_completion(
        self, messages: Messages, *, stream: bool, **options: Unpack[ChatOptions]
    ) -> Dictionary | AsyncGenerator[Dictionary, None]: ...

    async def create_chat_completion(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> Dictionary | AsyncGenerator[Dictionary, None]:
        """As ``Llava.create_chat_completion``; `stream`: True gives an asynchronous generator of chunks."""
        request = ChatRequest(**options)
        async with self._place(stream):
            reply = await self._call(lambda llava: chat_reply(llava, messages, stream, request))
            answer = AsyncStream(reply.stream)
            return _chunks(reply, answer) if stream else reply.whole(await answer.whole())

    def chat(self, system: str | None = None) -> AsyncChat:
        """A conversation: later questions remember earlier questions, answers and images."""
        return AsyncChat(self, system)

    async def score(self, images: Images, prompt: str, choices: Sequence[str], **options: Any) -> Scores:
        """As ``Llava.score``."""
        async with self._room:
            return await self._call(lambda llava: llava.score(images, prompt, choices, **options))

    async def loglikelihood(
        self, images: Images, prompt: str, answer: str | Sequence[int], **options: Any
    ) -> Loglikelihood:
        """As ``Llava.loglikelihood``."""
        async with self._room:
            return await self._call(lambda llava: llava.loglikelihood(images, prompt, answer, **options))

    async def explain(
        self, images: Images, prompt: str, answer: str | Sequence[int] | None = None, **options: Any
    ) -> HeatMap:
        """As ``Llava.explain``; `announce` is called in another thread."""
        async with self._room:
            return await self._call(lambda llava: llava.explain(images, prompt, answer, **options))

    # ------------------------------------------------------------------------------------------ the rest

    async def view(self, image: ImageSource, **options: Any) -> ImageView:
        """As ``Llava.view``."""
        return await self._call(lambda llava: llava.view(image, **options))

    async def encode_image(self, image: ImageSource | ImageEmbedding) -> ImageEmbedding:
        return await self._call(lambda llava: llava.encode_image(image))

    async def prompt_tokens(
        self, images: Images, prompt: str, *, raw: bool = False, system: str | None = None
    ) -> list[int | ImageMark]:
        return await self._call(lambda llava: llava.prompt_tokens(images, prompt, raw=raw, system=system))

    async def logits(
        self, images: Images, prompt: str | Sequence[int | ImageMark], **options: Any
    ) -> FloatArray:
        return await self._call(lambda llava: llava.logits(images, prompt, **options))


async def _chunks(reply: Reply, answer: AsyncStream) -> AsyncGenerator[Dictionary, None]:
    async with answer:
        for chunk in reply.opening():
            yield chunk
        async for text in answer:
            yield reply.piece(text)
        for chunk in reply.closing(answer.answer):
            yield chunk


class AsyncChat:
    """A conversation with an AsyncLlava, made by its chat(); as `Chat`. One question at a time."""

    def __init__(self, model: AsyncLlava, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._chat: Chat | None = None

    @property
    def messages(self) -> list[Message]:
        return self._chat.messages if self._chat is not None else []

    @overload
    async def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Answer: ...

    @overload
    async def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncStream: ...

    @overload
    async def ask(
        self, prompt: str, *, images: Images = ..., stream: bool, **options: Unpack[Options]
    ) -> Answer | AsyncStream: ...

    async def ask(
        self, prompt: str, *, images: Images = None, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | AsyncStream:
        """As ``Chat.ask``; `stream`: True gives an AsyncStream."""
        async with self._model._place(stream):
            asked = await self._model._call(
                lambda llava: self._of(llava)._asked(prompt, images, stream, options)
            )
            answer = AsyncStream(asked)
            return answer if stream else await answer.whole()

    async def add(self, prompt: str, answer: str, images: Images = None) -> None:
        """Adds a question and its answer without asking."""
        await self._model._call(lambda llava: self._of(llava).add(prompt, answer, images))

    def clear(self) -> None:
        """Forgets the conversation."""
        self._chat = None

    def _of(self, llava: Llava) -> Chat:
        self._chat = self._chat or Chat(llava, self._system)
        return self._chat
