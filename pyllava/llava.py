"""The library's front door: load a model, ask about images."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, TypeVar, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import _lib, models, templates
from ._worker import Worker
from .answer import Answer, FinishReason, Stream, Timings, Transcript, Usage
from .errors import (
    ClosedError,
    ContextOverflowError,
    GenerationCancelled,
    PyllavaError,
    UnsupportedModelError,
)
from .images import ImageSource, ImageSpec, content_hash, load_image, preprocess
from .templates import ImageMark, Message, Part, Template, Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
FloatArray: TypeAlias = npt.NDArray[np.float32]
Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
Progress: TypeAlias = Callable[[str, float], object]

_log = logging.getLogger("pyllava")
_DEFAULT_CTX = 4096
_CACHED_EMBEDDINGS = 256 << 20  # bytes of image embeddings kept
_RAW_STOP = ("###", "<|im_end|>", "<|im_start|>", "USER:", "</s>")


@dataclass(frozen=True)
class ImageEmbedding:
    """What the language model sees of one image."""

    array: FloatArray
    """float32 [n_tokens, n_embd]"""
    size: tuple[int, int]
    """Width and height of the picture in pixels."""
    key: int
    """Names the picture's content: equal pictures have equal keys."""

    def __len__(self) -> int:
        return len(self.array)


class Options(TypedDict, total=False):
    """The keyword arguments of ``ask`` that say how an answer is made; defaults and meaning in `Sampling`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None
    stop: Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError("stop: found a text, need a list of texts")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {self.max_tokens}, need 1 or more")

    def sampler(self, n_ctx: int) -> _lib.SamplerHandle:
        return _lib.SamplerHandle(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=n_ctx if self.repeat_last_n < 0 else self.repeat_last_n,
            seed=secrets.randbits(64) if self.seed is None else self.seed,
        )


@dataclass
class _Prompt:
    """A prompt ready to be computed, and what it took to get there."""

    spans: list[_lib.Span]
    images: list[ImageEmbedding]
    stop: tuple[str, ...]
    encode_seconds: float
    n_text: int = field(init=False)
    n_image: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_image = sum(map(len, self.images))
        self.n_text = sum(map(len, self.spans)) - self.n_image

    def __len__(self) -> int:
        return self.n_text + self.n_image

    def usage(self, cached: int = 0, completion: int = 0) -> Usage:
        return Usage(self.n_image, self.n_text, cached, completion, tuple(map(len, self.images)))


@dataclass(eq=False)
class _Run:
    """An answer in the making."""

    cancelled: bool = False
    seconds: float = 0.0  # spent on decoding


class Llava:
    """A LLaVA model on this machine.

    `model`: a GGUF file, a folder with one, or None for the small demo model in the package. `mmproj`: the projector; by
    default the one beside the model. `n_ctx`: positions for prompt, images and answer (default: what the model was trained
    for, at most 4096). `n_batch`: positions computed at once in prefill. `n_threads`: default, the cores this process may
    use. `n_gpu_layers`: this build computes on the CPU; a number above 0 gives a warning. `template`: a name in
    ``pyllava.templates.TEMPLATES``, or "auto" for what the model's metadata and name tell. `precision`: "exact" or "fast"
    (today the same; default, $PYLLAVA_PRECISION or "exact"). `use_mmap`: False reads the files into memory. `type_k`,
    `type_v`: the KV cache's types (default f32 in "exact", f16 in "fast"). `n_seq`: sequences of the KV cache. `progress`:
    called as progress(stage, fraction) with stage "load", "encode" or "prefill"; it may return False to cancel.

    Raises FileNotFoundError, ModelFileError (damaged file), ModelMismatchError (parts that do not fit together),
    UnsupportedModelError, ModelMemoryError (would not fit, with numbers). Use it in a ``with`` statement or call close().
    Calls from several threads are answered one after the other.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        device: str = "auto",
        n_gpu_layers: int = -1,
        template: str = "auto",
        precision: str | None = None,
        use_mmap: bool = True,
        type_k: str | None = None,
        type_v: str | None = None,
        n_seq: int = 1,
        progress: Progress | None = None,
    ) -> None:
        precision = precision or os.environ.get("PYLLAVA_PRECISION") or "exact"
        if precision not in ("exact", "fast"):
            raise ValueError(f"precision: found {precision!r}, need 'exact' or 'fast'")
        if device not in ("auto", "cpu"):
            raise ValueError(f"device: found {device!r}, this build has 'cpu' (and 'auto')")
        if n_gpu_layers > 0:
            _log.warning("n_gpu_layers=%d has no effect: this build has no GPU back end", n_gpu_layers)
        started = time.perf_counter()
        files = models.find(model, mmproj)
        self._worker = Worker("pyllava")
        self._lock = threading.RLock()
        self._progress = progress
        self._model = self._load_model(files, use_mmap)
        self.is_demo = files.is_demo
        self.files = files
        self.info = self._model.info
        self.template: Template = self._choose_template(template, files)
        self.n_ctx = n_ctx if n_ctx is not None else min(self.info.n_ctx_train, _DEFAULT_CTX)
        self.precision = precision
        self.devices = ["cpu"]
        self._session = self._worker.run(
            lambda: _lib.SessionHandle(
                self._model,
                n_ctx=self.n_ctx,
                n_batch=n_batch,
                n_seq=n_seq,
                n_threads=n_threads or 0,
                type_k=type_k,
                type_v=type_v,
                precision=precision,
            ),
            lambda on: None,
        )
        self._session.set_progress(progress)
        self._embeddings: OrderedDict[int, ImageEmbedding] = OrderedDict()
        self._runs: set[_Run] = set()
        self._owner: _Run | None = None  # the answer whose tokens sequence 0 holds
        self._closing = False
        self.load_seconds = time.perf_counter() - started

    # ------------------------------------------------------------------------------------------ life

    def _load_model(self, files: models.ModelFiles, use_mmap: bool) -> _lib.ModelHandle:
        cancelled = threading.Event()

        def progress(stage: str, fraction: float) -> bool:
            wanted = self._progress is None or self._progress(stage, fraction) is not False
            return wanted and not cancelled.is_set()

        def cancel(on: bool) -> None:
            if on:
                cancelled.set()

        return self._worker.run(
            lambda: _lib.ModelHandle(
                files.model, files.mmproj, use_mmap=use_mmap, progress=progress, log=_log.log
            ),
            cancel,
        )

    def _choose_template(self, template: str, files: models.ModelFiles) -> Template:
        metadata = self._model.metadata()
        vision = self._model.mmproj_metadata()
        merge = vision.get("clip.vision.mm_patch_merge_type")
        if merge not in (None, "flat") or vision.get("clip.vision.image_grid_pinpoints"):
            raise UnsupportedModelError(
                f"{files.mmproj}: a LLaVA-1.6 projector (several tiles per image); this version runs LLaVA-1.5"
            )
        if template != "auto":
            return templates.by_name(template)
        known = metadata.get("pyllava.template")
        general = metadata.get("general.name")
        return templates.guess(
            str(known) if known is not None else None,
            str(general) if general is not None else None,
            files.model.name,
        )

    def close(self) -> None:
        """Frees the model; a call that runs in another thread is ended first. A second call does nothing."""
        self._closing = True
        self.cancel()
        with self._lock:
            self._session.close()
            self._model.close()
            self._worker.close()
            self._embeddings.clear()

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Ends what other threads are doing with this model, unfinished streams too, with GenerationCancelled."""
        for run in list(self._runs):
            run.cancelled = True
        if self._lock.acquire(blocking=False):
            self._lock.release()  # no call is being computed
        else:
            self._session.cancel()

    def _compute(self, call: Callable[[], T]) -> T:
        """One step of the session, under the lock, which Ctrl-C, cancel() and close() can end."""
        if self._closing:
            raise ClosedError("the model was closed")
        _ = self._session.address  # ForkError before a thread is asked
        self._session.cancel(False)  # one that came too late for the call before
        try:
            return self._worker.run(call, self._session.cancel)
        except BaseException as error:
            self._owner = None
            if self._closing and isinstance(error, GenerationCancelled):
                raise ClosedError("the model was closed") from error
            raise

    # ------------------------------------------------------------------------------------------ text

    @property
    def n_embd(self) -> int:
        """Width of the language model and of image embeddings."""
        return self.info.n_embd

    def tokenize(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text. `parse_special`: ``</s>`` and the like are tokens, not letters."""
        plain = () if parse_special else ((0, len(text.encode())),)
        return self._model.tokenize(text, plain=plain, add_bos=add_bos)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the space that tokenize() puts in front; control tokens give nothing."""
        text = b"".join(self._model.piece(token) for token in ids).decode(errors="replace")
        return text.removeprefix(" ")

    def token_text(self, token: int) -> str:
        """One token as people may read it, control tokens by their names; incomplete UTF-8 is replaced."""
        return self._model.piece(token, with_special=True).decode(errors="replace")

    def prompt_tokens(
        self, images: Images, prompt: str, *, raw: bool | None = None, system: str | None = None
    ) -> list[int | ImageMark]:
        """The prompt as the model gets it: token ids, and an ImageMark where an image's rows go."""
        n_images = len(_as_list(images))
        found: list[int | ImageMark] = []
        for item in self._tokenized(self._parts(prompt, n_images, raw, system)):
            found += [item] if isinstance(item, ImageMark) else item
        return found

    def _parts(self, prompt: str, n_images: int, raw: bool | None, system: str | None) -> list[Part]:
        if self._is_raw(prompt, n_images, raw):
            return templates.raw(prompt, n_images)
        return templates.render(self.template, [Message("user", prompt, n_images)], system=system)

    @staticmethod
    def _is_raw(prompt: str, n_images: int, raw: bool | None) -> bool:
        return raw if raw is not None else n_images > 0 and templates.IMAGE_MARK in prompt

    def _tokenized(self, parts: Sequence[Part]) -> list[list[int] | ImageMark]:
        """Texts between images become ids, each stretch on its own as in training; the first begins with BOS."""
        found: list[list[int] | ImageMark] = []
        add_bos = self.info.add_bos
        at = 0
        while at < len(parts) or add_bos:
            stretch = []
            while at < len(parts) and isinstance(part := parts[at], Text):
                stretch.append(part)
                at += 1
            if stretch or add_bos:
                found.append(self._tokenize_stretch(stretch, add_bos))
            add_bos = False
            if at < len(parts) and isinstance(part := parts[at], ImageMark):
                found.append(part)
                at += 1
        return found

    def _tokenize_stretch(self, stretch: Sequence[Text], add_bos: bool) -> list[int]:
        plain, at = [], 0
        for part in stretch:
            end = at + len(part.text.encode())
            if not part.special:
                plain.append((at, end))
            at = end
        return self._model.tokenize("".join(part.text for part in stretch), plain=plain, add_bos=add_bos)

    # ------------------------------------------------------------------------------------------ images

    def encode_image(self, image: ImageSource) -> ImageEmbedding:
        """The embeddings of one image: a path, bytes, PIL image or array.

        Raises ImageError where it cannot be read, PyllavaError where the model has no projector.
        """
        return self._encode(load_image(image))

    def _encode(self, image: Image.Image) -> ImageEmbedding:
        if not self.info.has_vision:
            raise PyllavaError(
                f"{self.files.model}: an image was given, but there is no projector: name one with mmproj="
            )
        key = int.from_bytes(content_hash(image)[:8], "little")
        with self._lock:
            known = self._embeddings.get(key)
            if known is not None:
                self._embeddings.move_to_end(key)
                return known
            views = preprocess(
                image, ImageSpec(self.info.image_size, self.info.image_mean, self.info.image_std)
            )
            rows = self._compute(lambda: self._session.encode(views.pixels))
            array = rows.reshape(-1, self.info.n_embd)
            array.flags.writeable = False
            found = ImageEmbedding(array, image.size, key)
            self._embeddings[key] = found
            while len(self._embeddings) > 1 and self._embedding_bytes() > _CACHED_EMBEDDINGS:
                self._embeddings.popitem(last=False)
            return found

    def _embedding_bytes(self) -> int:
        return sum(e.array.nbytes for e in self._embeddings.values())

    # ------------------------------------------------------------------------------------------ answers

    def _prepare(
        self, parts: Sequence[Part], images: Sequence[ImageSource | ImageEmbedding], stop: Sequence[str]
    ) -> _Prompt:
        started = time.perf_counter()
        seen = [i if isinstance(i, ImageEmbedding) else self.encode_image(i) for i in images]
        seconds = time.perf_counter() - started
        spans: list[_lib.Span] = []
        for item in self._tokenized(parts):
            if isinstance(item, ImageMark):
                spans.append(_lib.Rows(seen[item.index].array, seen[item.index].key))
            else:
                spans.append(_lib.Tokens(item))
        marks = sum(isinstance(item, ImageMark) for item in parts)
        if marks != len(seen):
            raise ValueError(f"{len(seen)} images for {marks} places in the prompt")
        return _Prompt(spans, seen, tuple(stop), seconds)

    def _check_room(self, prompt: _Prompt) -> None:
        if len(prompt) >= self.n_ctx:
            raise ContextOverflowError(
                f"prompt of {len(prompt)} positions ({prompt.n_image} of images, {prompt.n_text} of text) leaves no room for an "
                f"answer in n_ctx={self.n_ctx}: raise n_ctx (-c) or shorten the prompt"
            )

    @overload
    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: Literal[False] = ...,
        raw: bool | None = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: Literal[True],
        raw: bool | None = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Stream: ...

    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: bool = False,
        raw: bool | None = None,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer | Stream:
        """Asks about one image, several in one prompt, or none (None: text only).

        An image is a path, the bytes of a file, a PIL image or an array. `raw`: the prompt is used as it stands, with an
        ``<image>`` mark for each image, instead of through the model's template; by default it is where it holds such a
        mark and images are given. `system` replaces the template's system message. `stream`: True gives a Stream of pieces
        instead of the whole Answer. Options, with their defaults: max_tokens=512, temperature=0.0 (greedy), top_k=0,
        top_p=1.0, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64 (-1: all), seed=None (random), stop=().

        Raises ImageError, ContextOverflowError where prompt and images do not fit in n_ctx, ValueError for a wrong
        argument, GenerationCancelled after cancel().
        """
        sampling = Sampling(**options)
        given = _as_list(images)
        parts = self._parts(prompt, len(given), raw, system)
        stop = _RAW_STOP if self._is_raw(prompt, len(given), raw) else self.template.stop
        return self._answer(parts, given, stop, sampling, stream)

    def _answer(
        self,
        parts: Sequence[Part],
        images: Sequence[ImageSource | ImageEmbedding],
        stop: Sequence[str],
        sampling: Sampling,
        stream: bool,
    ) -> Answer | Stream:
        prompt = self._prepare(parts, images, (*stop, *sampling.stop))
        self._check_room(prompt)
        result: list[Answer] = []
        pieces = self._generate(prompt, sampling, result)
        if stream:
            return Stream(prompt.usage(), pieces, result)
        for _ in pieces:
            pass
        return result[0]

    def _generate(self, prompt: _Prompt, sampling: Sampling, result: list[Answer]) -> Iterator[str]:
        run = _Run()
        self._runs.add(run)
        try:
            yield from self._generate_as(run, prompt, sampling, result)
        finally:
            self._runs.discard(run)

    def _generate_as(
        self, run: _Run, prompt: _Prompt, sampling: Sampling, result: list[Answer]
    ) -> Iterator[str]:
        sampler, transcript = sampling.sampler(self.n_ctx), Transcript(prompt.stop)
        started = time.perf_counter()
        logits, cached = self._prefill(run, prompt.spans)
        prefill_seconds = time.perf_counter() - started
        room = min(sampling.max_tokens, self.n_ctx - len(prompt))
        tokens: list[int] = []
        reason: FinishReason = "length"
        while len(tokens) < room:
            token = sampler.sample(logits)
            if self._model.is_end(token):
                reason = "stop"
                break
            tokens.append(token)
            if piece := transcript.push(self._model.piece(token)):
                yield piece
            if transcript.stopped:
                reason = "stop"
                break
            if len(tokens) < room:
                logits = self._step(run, prompt, tokens)
        if piece := transcript.finish():
            yield piece
        timings = Timings(self.load_seconds, prompt.encode_seconds, prefill_seconds, run.seconds)
        usage = prompt.usage(cached, len(tokens))
        result.append(Answer(transcript.text, usage, timings, reason, tuple(tokens)))

    def _prefill(self, run: _Run, spans: Sequence[_lib.Span]) -> tuple[FloatArray, int]:
        with self._lock:
            if run.cancelled and not self._closing:
                raise GenerationCancelled("cancelled")
            computed = self._compute(lambda: self._session.prefill(spans))
            self._owner = run
            return computed

    def _step(self, run: _Run, prompt: _Prompt, tokens: list[int]) -> FloatArray:
        """Logits after the last token; if another answer has used the sequence, this one is put back first."""
        started = time.perf_counter()
        with self._lock:
            if self._owner is run and not run.cancelled:
                logits = self._compute(lambda: self._session.decode(tokens[-1:], seqs=[0])).reshape(-1)
            else:
                logits, _ = self._prefill(run, [*prompt.spans, _lib.Tokens(tokens)])
        run.seconds += time.perf_counter() - started
        return logits

    def logits(
        self, images: Images, prompt: str, *, raw: bool | None = None, system: str | None = None
    ) -> FloatArray:
        """Logits of every position of the whole prompt (BOS, text, image rows): float32 [n_positions, n_vocab]."""
        given = _as_list(images)
        prepared = self._prepare(self._parts(prompt, len(given), raw, system), given, ())
        with self._lock:
            self._owner = None
            return self._compute(lambda: self._session.logits(prepared.spans))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation: later questions remember earlier questions, answers and images."""
        return Chat(self, system)


class Chat:
    """A conversation with a model; made by ``Llava.chat()``.

    Images are encoded once, and the part of the conversation that the model still holds is not computed again.
    """

    def __init__(self, llava: Llava, system: str | None = None) -> None:
        self._llava = llava
        self.system = system
        self.messages: list[Message] = []
        self._images: list[ImageEmbedding] = []

    @overload
    def ask(
        self, prompt: str, images: Images = ..., *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Answer: ...

    @overload
    def ask(
        self, prompt: str, images: Images = ..., *, stream: Literal[True], **options: Unpack[Options]
    ) -> Stream: ...

    def ask(
        self, prompt: str, images: Images = None, *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | Stream:
        """The next question, with or without new images; options as in ``Llava.ask``.

        The question and its answer become part of the conversation when the answer is complete.
        """
        sampling = Sampling(**options)
        new = [self._llava.encode_image(image) for image in _as_list(images)]
        question = Message("user", prompt, len(new))
        template = self._llava.template
        parts = templates.render(template, [*self.messages, question], system=self.system)
        seen = [*self._images, *new]
        answer = self._llava._answer(parts, seen, template.stop, sampling, stream)
        if isinstance(answer, Stream):
            answer._pieces = self._remembered(answer, answer._pieces, question, seen)
            return answer
        self._remember(question, seen, answer)
        return answer

    def clear(self) -> None:
        """Forgets the conversation."""
        self.messages, self._images = [], []

    def _remember(self, question: Message, images: list[ImageEmbedding], answer: Answer) -> None:
        self.messages += [question, Message("assistant", answer.text)]
        self._images = images

    def _remembered(
        self, stream: Stream, pieces: Iterator[str], question: Message, images: list[ImageEmbedding]
    ) -> Iterator[str]:
        yield from pieces
        self._remember(question, images, stream.answer)


def _as_list(images: Images) -> list[ImageSource]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]
