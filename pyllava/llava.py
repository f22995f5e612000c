"""The library's front door: load a model, ask about images."""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import secrets
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import numpy as np
import numpy.typing as npt
import PIL.Image

from . import _lib, models, templates
from ._engine import Engine, Stats
from ._request import Answering, Call, Encode, Score, Written
from ._script import Script, Stretch
from .answer import Answer, Stream, Timings, Usage
from .errors import ContextOverflowError, PyllavaError
from .images import ImageSource, ImageSpec, content_hash, load_image, preprocess, tile_grid
from .templates import ImageMark, Message, Part, Template, Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

FloatArray: TypeAlias = npt.NDArray[np.float32]
Images: TypeAlias = "ImageSource | ImageEmbedding | Sequence[ImageSource | ImageEmbedding] | None"
Progress: TypeAlias = Callable[[str, float], object]

_log = logging.getLogger("pyllava")
_DEFAULT_CTX = 4096
_LONG_TEXT = 1 << 16  # bytes
_MOST_PARALLEL = 128
_KEPT = 2  # sequences for each answer under way: the others keep what earlier ones held
_RAW_STOP = ("###", "<|im_end|>", "<|im_start|>", "USER:", "</s>")


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


@dataclass(frozen=True, eq=False)
class _Picture:
    """A decoded picture and what it will be to the model."""

    image: PIL.Image.Image
    layout: _lib.Layout
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows


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
    reuse: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, when an answer ends, and whether what the model still holds of its prompt is used again."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: Sequence[str] = ()
    reuse: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError("stop: found a text, need a list of texts")
        operator.index(self.max_tokens)  # TypeError for anything but an integer
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {self.max_tokens}, need 1 or more")

    def sampler(self, model: _lib.ModelHandle, n_ctx: int) -> _lib.SamplerHandle:
        return _lib.SamplerHandle(
            model,
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

    def usage(self, cached: int = 0, completion: int = 0) -> Usage:
        return Usage(self.n_image, self.n_text, cached, completion, tuple(map(len, self.images)))


class Llava:
    """A LLaVA model on this machine.

    `model`: a GGUF file, a folder with one, or None for the small demo model in the package. `mmproj`: the projector; by
    default the one beside the model. `n_ctx`: positions for prompt, images and answer (default: what the model was trained
    for, at most 4096). `n_batch`: positions computed at once in prefill. `n_threads`: default, the physical cores this process may
    use. `device`: "auto" (the GPUs of this machine, or $PYLLAVA_DEVICE), "cpu", or names from ``pyllava.devices()`` with commas
    between them. `n_gpu_layers`: so many of the last layers go there, and the output too if it is more than there are layers
    (-1: all that fit); the CPU computes the rest. `vision_device`: where the vision tower goes ("auto": the first device, where
    it fits). `main_gpu`: which of the devices that is. `tensor_split`: shares of several devices (default: by free memory).
    `kv_offload`: False keeps the KV cache in host memory. `flash_attn`: attention on devices as one operation (default: where
    the device has it, and precision is "fast"). `template`: a name in
    ``pyllava.templates.TEMPLATES``, or "auto" for what the model's metadata and name tell. `precision`: "fast", with numbers
    rounded within stated gates, or "exact", computed as the reference does to float error, and several times slower (default:
    $PYLLAVA_PRECISION, else "fast"). `use_mmap`: False reads the files into memory. `type_k`, `type_v`: the KV cache's types
    (default: f16 in "fast", f32 in "exact"). For LLaVA-1.6, which sees a picture whole and in tiles: `image_max_tiles`, the
    most tiles of a picture (fewer are faster and show less; 0: the whole alone), and `image_merge`, "unpad" as it was trained
    or "flat", the rows that llama.cpp gives. `n_parallel`: answers computed at the same time, of calls from several threads
    and of streams. `kv_cells`: positions that all of them together may use, and what is kept of earlier ones (default:
    n_ctx; at most 2 n_parallel n_ctx). `progress`: called as progress(stage, fraction), in the model's own thread, with stage "load", "upload"
    (to a device), "encode" or "prefill"; it may return False to cancel.

    Raises FileNotFoundError, ModelFileError (damaged file), ModelMismatchError (parts that do not fit together),
    UnsupportedModelError, ModelMemoryError (would not fit, with numbers). Use it in a ``with`` statement or call close().
    It may be used from several threads. What they ask is computed together, a token of each answer in one step, up to
    n_parallel answers; the others wait, first come, first served. No answer depends on what is computed beside it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_batch: int = 1024,
        n_threads: int | None = None,
        device: str = "auto",
        n_gpu_layers: int = -1,
        vision_device: str = "auto",
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        kv_offload: bool = True,
        flash_attn: bool | None = None,
        template: str = "auto",
        precision: str | None = None,
        use_mmap: bool = True,
        type_k: str | None = None,
        type_v: str | None = None,
        image_max_tiles: int | None = None,
        image_merge: str = "unpad",
        n_parallel: int = 4,
        kv_cells: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        precision = precision or os.environ.get("PYLLAVA_PRECISION") or "fast"
        if precision not in ("fast", "exact"):
            raise ValueError(f"precision: found {precision!r}, need 'fast' or 'exact'")
        if image_merge not in ("unpad", "flat"):
            raise ValueError(f"image_merge: found {image_merge!r}, need 'unpad' or 'flat'")
        if image_max_tiles is not None and operator.index(image_max_tiles) < 0:
            raise ValueError(f"image_max_tiles: found {image_max_tiles}, need 0 or more")
        if not 1 <= operator.index(n_parallel) <= _MOST_PARALLEL:
            raise ValueError(f"n_parallel: found {n_parallel}, need 1..{_MOST_PARALLEL}")
        started = time.perf_counter()
        files = models.find(model, mmproj)
        self._progress = progress
        session: dict[str, Any] = {
            "n_batch": n_batch,
            "n_threads": n_threads or 0,
            "type_k": type_k,
            "type_v": type_v,
            "precision": precision,
            "flash_attn": flash_attn,
        }
        placement = _lib.Placement(
            device=device,
            vision_device=vision_device,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
            kv_on_host=not kv_offload,
            plan_for=_lib.SessionOptions(
                n_ctx=n_ctx or 0,
                n_views=0,
                n_seq=_KEPT * n_parallel if kv_cells else 1,  # of kv_cells, or n_ctx for the only one
                kv_cells=kv_cells or 0,
                **session,
            ),
        )
        self._engine = Engine(self, operator.attrgetter("_progress"))
        try:
            self._engine.load(
                lambda report: _lib.ModelHandle(
                    files.model,
                    files.mmproj,
                    use_mmap=use_mmap,
                    placement=placement,
                    progress=report,
                    log=_log.log,
                )
            )
            self._set_up(files, n_ctx, template, precision, image_merge, image_max_tiles)
            self._open(session, n_parallel, kv_cells)
        except BaseException:
            self._engine.close()
            raise
        self.load_seconds = time.perf_counter() - started

    # ------------------------------------------------------------------------------------------ life

    def _set_up(
        self,
        files: models.ModelFiles,
        n_ctx: int | None,
        template: str,
        precision: str,
        image_merge: str,
        image_max_tiles: int | None,
    ) -> None:
        self._model = self._engine.model
        self.is_demo = files.is_demo
        self.files = files
        self.info = self._model.info
        self._flat = image_merge == "flat" or not self.info.anyres
        self._image_spec = self._spec(image_max_tiles) if self.info.has_vision else None
        self.template: Template = self._choose_template(template, files)
        self.n_ctx = n_ctx if n_ctx is not None else min(self.info.n_ctx_train, _DEFAULT_CTX)
        if self.n_ctx > self.info.n_ctx_train:
            _log.warning("n_ctx=%d: the model was trained for %d", self.n_ctx, self.info.n_ctx_train)
        self.precision = precision
        self.devices = self._model.devices

    def _open(self, options: dict[str, Any], n_parallel: int, kv_cells: int | None) -> None:
        """Makes the session: n_parallel answers at once, and as many sequences that keep what earlier ones held."""
        self.n_parallel = n_parallel
        self.kv_cells = self.n_ctx if kv_cells is None else kv_cells
        n_seq = _KEPT * n_parallel

        def open_session() -> None:
            session = _lib.SessionHandle(
                self._model,
                n_ctx=self.n_ctx,
                n_views=self._most_views(),
                n_seq=n_seq,
                kv_cells=self.kv_cells,
                **options,
            )
            self._engine.open(session, n_parallel, n_seq, options["n_batch"], self.kv_cells)

        self._engine.run(Call(open_session))
        self._session = self._engine.session

    def _choose_template(self, template: str, files: models.ModelFiles) -> Template:
        metadata = self._model.metadata()
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
        """Frees the model; calls that run in other threads are ended first. A second call does nothing.

        From a progress callback, the model is freed when the call that reports has ended.
        """
        self._engine.close()

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Ends what other threads are doing with this model, unfinished streams too, with GenerationCancelled."""
        self._engine.cancel_all()

    def stats(self) -> Stats:
        """What the model is doing now, and what it has done so far."""
        return self._engine.stats()

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
        self, images: Images, prompt: str, *, raw: bool = False, system: str | None = None
    ) -> list[int | ImageMark]:
        """The prompt as the model gets it: token ids, and an ImageMark where an image's rows go."""
        n_images = len(_as_list(images))
        found: list[int | ImageMark] = []
        for item in self._tokenized(self._parts(prompt, n_images, raw, system)):
            found += [item] if isinstance(item, ImageMark) else item
        return found

    def _parts(self, prompt: str, n_images: int, raw: bool, system: str | None) -> list[Part]:
        question = _question(prompt, n_images)
        if raw:
            return templates.raw(prompt, n_images)
        return templates.render(self.template, [question], system=system)

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
        if at > _LONG_TEXT and at > self.n_ctx * self._longest_piece():  # before minutes go into its tokens
            raise ContextOverflowError(f"prompt of {at} bytes cannot fit in n_ctx={self.n_ctx}: shorten it")
        return self._model.tokenize("".join(part.text for part in stretch), plain=plain, add_bos=add_bos)

    def _longest_piece(self) -> int:
        return max(len(self._model.piece(token, with_special=True)) for token in range(self.info.n_vocab))

    # ------------------------------------------------------------------------------------------ images

    def _spec(self, max_tiles: int | None) -> ImageSpec:
        info = self.info
        side = info.image_size
        fitting = tuple(
            (width, height)
            for width, height in info.pinpoints
            if max_tiles is None or width // side * (height // side) <= max_tiles
        )
        return ImageSpec(side, info.image_mean, info.image_std, "anyres" if info.anyres else "pad", fitting)

    def _most_views(self) -> int:
        """Views of a picture at most: they are encoded in one batch."""
        if self._image_spec is None:
            return 1
        side = self._image_spec.image_size
        return 1 + max((w // side * (h // side) for w, h in self._image_spec.pinpoints), default=0)

    def encode_image(self, image: ImageSource | ImageEmbedding) -> ImageEmbedding:
        """The embeddings of one image: a path, bytes, PIL image or array (or what this gave before, unchanged).

        Raises ImageError where it cannot be read, PyllavaError where the model has no projector.
        """
        epoch = self._engine.epoch()
        return self._encode(self._look_at(image), epoch)

    def _look_at(self, source: ImageSource | ImageEmbedding) -> _Picture | ImageEmbedding:
        """Decodes an image and counts the rows it will take."""
        if isinstance(source, ImageEmbedding):
            return source
        if self._image_spec is None:
            raise PyllavaError(
                f"{self.files.model}: an image was given, but there is no projector: name one with mmproj="
            )
        image = load_image(source)
        layout = _lib.Layout(tile_grid(image.size, self._image_spec), image.size, self._flat)
        return _Picture(image, layout, self._model.merge_length(layout))

    def _encode(self, picture: _Picture | ImageEmbedding, epoch: object) -> ImageEmbedding:
        if isinstance(picture, ImageEmbedding):
            return picture
        content = content_hash(picture.image)
        known: ImageEmbedding | None = self._engine.known(content)
        if known is not None:
            return known
        assert self._image_spec is not None
        views = preprocess(picture.image, self._image_spec)

        def merge(features: FloatArray) -> ImageEmbedding:
            array = self._model.merge(picture.layout, features)
            array.flags.writeable = False
            key = hashlib.blake2b(array.data.cast("B"), digest_size=8).digest()
            return ImageEmbedding(array, picture.image.size, int.from_bytes(key, "little"))

        return self._engine.run(Encode(content, views.pixels, merge), epoch)

    # ------------------------------------------------------------------------------------------ answers

    def _prepare(
        self,
        texts: Sequence[list[int] | ImageMark],
        images: Sequence[ImageSource | ImageEmbedding],
        most: int,
        epoch: object,
    ) -> _Prompt:
        """Encodes the images and puts them in their places; more than `most` positions are refused."""
        marks = [text.index for text in texts if isinstance(text, ImageMark)]
        if sorted(marks) != list(range(len(images))):
            raise ValueError(f"{len(images)} images for {len(marks)} places in the prompt: {marks}")
        n_text = sum(len(item) for item in texts if isinstance(item, list))
        pictures = [self._look_at(image) for image in images]
        self._check_room(n_text, sum(map(len, pictures)), most)
        started = time.perf_counter()
        seen = [self._encode(picture, epoch) for picture in pictures]
        seconds = time.perf_counter() - started
        stretches = []
        for item in texts:
            if isinstance(item, ImageMark):
                rows = seen[item.index]
                stretches.append(Stretch(_lib.Rows(rows.array, rows.key)))
            else:
                stretches.append(Stretch(_lib.Tokens(item)))
        return _Prompt(Script(stretches), seen, seconds)

    def _check_room(self, n_text: int, n_image: int, most: int) -> None:
        need = n_text + n_image
        if need <= most:
            return
        ways = []
        trained = self.info.n_ctx_train
        if need < trained:
            ways.append(f"raise n_ctx (-c) to {need + 1} or more, {trained} at most")
        if n_image and self._most_views() > 1:
            ways.append("show fewer tiles of an image (image_max_tiles, --image-max-tiles)")
        ways.append("shorten the prompt" if n_text > n_image or not ways else "give fewer images")
        raise ContextOverflowError(
            f"prompt of {need} positions ({n_image} of images, {n_text} of text) does not fit in "
            f"n_ctx={self.n_ctx} with room for an answer: {', or '.join(ways)}"
        )

    @overload
    def ask(
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
    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: Literal[True],
        raw: bool = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Stream: ...

    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: bool = False,
        raw: bool = False,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer | Stream:
        """Asks about one image, several in one prompt, or none (None: text only).

        An image is a path, the bytes of a file, a PIL image or an array. `raw`: the prompt is used as it stands, with an
        ``<image>`` mark for each image and special tokens in it, instead of through the model's template. `system` replaces the template's system message. `stream`: True gives a Stream of pieces
        instead of the whole Answer. Options, with their defaults: max_tokens=512, temperature=0.0 (greedy), top_k=0,
        top_p=1.0, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64 (-1: all), seed=None (random), stop=(),
        reuse=True (False: the whole prompt is computed afresh, not what the model still holds of it. In a conversation
        that is earlier answers too, whose positions else stay as they were computed token by token).

        Raises ImageError, ContextOverflowError where prompt and images do not fit in n_ctx, ValueError for a wrong
        argument, GenerationCancelled after cancel().
        """
        sampling = Sampling(**options)
        _check_order(images, prompt)
        given = _as_list(images)
        parts = self._parts(prompt, len(given), raw, system)
        stop = _RAW_STOP if raw else self.template.stop
        answer = self._answer(parts, given, stop, sampling, stream)
        return answer if stream else _last(answer)

    def _answer(
        self,
        parts: Sequence[Part],
        images: Sequence[ImageSource | ImageEmbedding],
        stop: Sequence[str],
        sampling: Sampling,
        stream: bool,
        before: Script | None = None,
        remember: Callable[[_Prompt, Answer], None] | None = None,
    ) -> Stream:
        """An answer, computed when it is asked for. Without `stream` it has no pieces.

        `before`: what a conversation has had computed. `remember` is told of the answer.
        """
        epoch = self._engine.epoch()
        prompt = self._prepare(self._tokenized(parts), images, self.n_ctx - 1, epoch)
        if before is not None and sampling.reuse:
            prompt.script = prompt.script.after(before)
        job = Answering(
            prompt.script,
            self._model,
            lambda: sampling.sampler(self._model, self.n_ctx),
            (*stop, *sampling.stop),
            min(sampling.max_tokens, self.n_ctx - len(prompt)),
            reuse=sampling.reuse,
            stream=stream,
        )
        pieces = self._pieces(self._engine.pieces(job, epoch), prompt, remember)
        return Stream(prompt.usage(), pieces, lambda: self._engine.cancel(job))

    def _pieces(
        self,
        pieces: Generator[str, None, Written],
        prompt: _Prompt,
        remember: Callable[[_Prompt, Answer], None] | None,
    ) -> Generator[str, None, Answer]:
        written = yield from pieces
        timings = Timings(
            self.load_seconds, prompt.encode_seconds, written.prefill, written.decode, written.wait
        )
        usage = prompt.usage(written.n_cached, len(written.tokens))
        answer = Answer(written.text, usage, timings, written.reason, written.tokens, written.log_probs)
        _log_answer(answer, written)
        if remember is not None:
            remember(prompt, answer)
        return answer

    def logits(
        self,
        images: Images,
        prompt: str | Sequence[int | ImageMark],
        *,
        answer: Sequence[int] = (),
        raw: bool = False,
        system: str | None = None,
    ) -> FloatArray:
        """Logits of every position, for evaluation: float32 [n_positions, n_vocab].

        prompt: a question as in ask(), or what the model is to get as it stands, token ids and ImageMarks, as
        prompt_tokens() gives them (no BOS is added); the positions are those of BOS, text and image rows.
        answer: token ids that follow, computed as rows of an answer, as while it is generated; their
        positions come last.
        """
        given, ids = _as_list(images), self._checked(answer)
        epoch = self._engine.epoch()
        if isinstance(prompt, str):
            texts = self._tokenized(self._parts(prompt, len(given), raw, system))
        else:
            texts = _stretches(prompt)
            self._checked([token for part in texts if isinstance(part, list) for token in part])
        if not texts:
            raise ValueError("empty prompt")
        prepared = self._prepare(texts, given, self.n_ctx - len(ids), epoch)
        return self._engine.run(Score(prepared.script.followed_by(ids), self.info.n_vocab), epoch)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids that the vocabulary has."""
        for i, token in enumerate(ids):
            if not 0 <= token < self.info.n_vocab:
                raise ValueError(f"token {i}: found {token}, need 0..{self.info.n_vocab - 1}")
        return [int(token) for token in ids]

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
        self._computed: Script | None = None  # what was computed for the last answer, and how

    @overload
    def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Answer: ...

    @overload
    def ask(
        self, prompt: str, *, images: Images = ..., stream: Literal[True], **options: Unpack[Options]
    ) -> Stream: ...

    def ask(
        self,
        prompt: str,
        *positional: Images,
        images: Images = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | Stream:
        """The next question, with or without new images; options as in ``Llava.ask``.

        The question and its answer become part of the conversation when the answer is complete. What is asked next
        is computed behind them: an answer's positions stay as they were computed, token by token, and are computed
        that way again should they be gone.
        """
        images = _by_name(positional, images)
        sampling = Sampling(**options)
        known = self._known_images()
        n_known = len(known)
        seen = [*known, *_as_list(images)]
        question = _question(prompt, len(seen) - n_known)
        parts = self._parts(question)

        def remember(prepared: _Prompt, answer: Answer) -> None:
            self._remember(question, answer.text, prepared.images[n_known:])
            self._computed = prepared.script.followed_by(answer.tokens[:-1])

        stop = self._llava.template.stop
        answer = self._llava._answer(parts, seen, stop, sampling, stream, self._computed, remember)
        return answer if stream else _last(answer)

    def add(self, prompt: str, answer: str, images: Images = None) -> None:
        """Adds a question and its answer without asking: an example, an earlier conversation, an answer that was stopped."""
        given = _as_list(images)
        question = _question(prompt, len(given))
        self._parts(question)  # ValueError where marks and images do not fit
        self._remember(question, answer, [self._llava.encode_image(image) for image in given])

    def _parts(self, question: Message) -> list[Part]:
        return templates.render(self._llava.template, [*self.messages, question], system=self.system)

    def _remember(self, question: Message, answer: str, images: Sequence[ImageEmbedding]) -> None:
        self._images = [*self._known_images(), *images]
        self.messages = [
            *self.messages,
            question,
            Message("assistant", answer),
        ]  # an interrupt comes before or after

    def _known_images(self) -> list[ImageEmbedding]:
        """Those of the messages: there may be more where an interrupt has cut off a message."""
        return self._images[: sum(message.images for message in self.messages)]

    def clear(self) -> None:
        """Forgets the conversation."""
        self.messages, self._images, self._computed = [], [], None


def _by_name(positional: tuple[Images, ...], images: Images) -> Images:
    """Images of Chat.ask(), which once came second."""
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


def _check_order(images: Images, prompt: object) -> None:
    """ask(prompt, images) is an easy mistake, and a file that does not exist a poor hint."""
    if isinstance(prompt, str):
        is_text = isinstance(images, str) and not images.startswith("data:") and not os.path.exists(images)
        wrong = is_text and "\n" not in prompt and os.path.isfile(prompt)
    else:
        wrong = isinstance(images, str)
    if wrong:
        raise TypeError(
            f"ask(images, prompt): the images come first, found prompt {_short(prompt)} and images {_short(images)}"
        )


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _last(stream: Stream) -> Answer:
    for _ in stream:
        pass
    return stream.answer


def _log_answer(answer: Answer, written: Written) -> None:
    usage, timings = answer.usage, answer.timings
    _log.debug(
        "answer: %d tokens (%s) to a prompt of %d positions, %d of them kept from before; waited %.3f s, "
        "prefill %.3f s, decode %.3f s; set aside %d times",
        usage.completion_tokens,
        answer.finish_reason,
        usage.prompt_tokens,
        usage.cached_tokens,
        timings.wait,
        timings.prefill,
        timings.decode,
        written.n_set_aside,
    )


def _stretches(prompt: Sequence[int | ImageMark]) -> list[list[int] | ImageMark]:
    """Consecutive ids together."""
    found: list[list[int] | ImageMark] = []
    for item in prompt:
        if isinstance(item, ImageMark):
            found.append(item)
        elif found and isinstance(found[-1], list):
            found[-1].append(int(item))
        else:
            found.append([int(item)])
    return found


def _question(prompt: str, n_images: int) -> Message:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: found {type(prompt).__name__}, need a text")
    return Message("user", prompt, n_images)


def _as_list(images: Images) -> list[ImageSource | ImageEmbedding]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]
