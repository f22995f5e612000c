"""The library's front door: load a model, ask about images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from . import _completion, _explain, _lib, _structured, _template_choice, batch, models, templates
from ._embeddings import ImageEmbedding, Images, Pictures, listed, spec_of
from ._engine import Engine
from ._explain import Cost, Covered
from ._habits import check_call, check_order, check_sources, without_prompt
from ._lib.values import number_text
from ._projector import projector_of
from ._prompt import Prompt, Prompts, checked_ids, joined, stretches_of
from ._request import Answering, Call, Limits, Score, Written
from ._room import KvCells, Room, rooms
from ._scheduler import Stats
from ._scorer import Loglikelihood, Normalize, Question, Scorer, Scores, token_logprob
from ._script import Script
from ._sequences import SHARED_ON_CUDA, Sequences
from .answer import Answer, Stream, StreamPiece, Timings, TokenLogprob
from .chat import Chat
from .errors import ModelMemoryError
from .formats import CacheType
from .heat_map import HeatMap
from .images import ImageSource
from .sampling import Options, Sampling
from .templates import RAW_STOP, ImageMark, Part, Template

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .view import ImageView

T = TypeVar("T")
FloatArray: TypeAlias = npt.NDArray[np.float32]
Progress: TypeAlias = Callable[[str, float], object]
Precision: TypeAlias = Literal["fast", "exact"]
ImageMerge: TypeAlias = Literal["unpad", "flat"]

_log = logging.getLogger("pyllava")
_MOST_PARALLEL = 128
_CACHED = 256 << 20  # bytes of image embeddings
_EXPLAINED = 64  # tokens of an answer that is to be explained
_KEPT = 2  # sequences for each answer under way: the others keep what earlier ones held


class Llava:
    """A LLaVA model on this machine. All parameters but the first two are given by name.

    What is loaded:

    - `model`: a GGUF file, a folder with one, or None for the small demo model in the package.
    - `mmproj`: the projector's file; by default the one beside the model.
    - `use_mmap`: False reads the files into memory.
    - `template`: a name in ``pyllava.templates.TEMPLATES``, or "auto" for what the model's metadata and names tell
      (where they tell nothing, "vicuna_v1" with a warning).

    How it is computed:

    - `precision`: "fast", with numbers rounded within stated gates, or "exact", computed as the reference
      does to float error, and several times slower (default: $PYLLAVA_PRECISION, else "fast").
    - `n_threads`: by default, the physical cores that this process may use.
    - `n_batch`: positions of prompts computed at once.
    - `n_parallel`: answers computed at the same time, for calls from several threads and for streams.

    Context, in positions (text tokens and image rows):

    - `n_ctx`: for prompt, images and answer. By default as many as they need, up to what the model was trained for
      and what memory holds; where a GPU holds the KV cache, 4096, or as many as the largest picture and 1024 more.
    - `kv_cells`: for all answers together, and for what is kept of earlier ones (default: n_ctx; if that is not given
      either, 4096, which only an answer that needs more by itself exceeds; at most 2 * n_parallel * n_ctx). "pictures":
      enough for n_parallel questions about a picture each, with 1024 positions beside it, or as many as memory holds.
    - `type_k`, `type_v`: the KV cache's number formats (default: f16 in "fast", f32 in "exact").

    Devices:

    - `device`: "auto" (the GPUs of this machine, or $PYLLAVA_DEVICE), "cpu", or names from
      ``pyllava.devices()`` with commas between them.
    - `n_gpu_layers`: the last n layers go to the devices, and the output, too, if n is greater than the
      number of layers (-1: all that fit); the CPU computes the rest.
    - `vision_device`: the device of the vision tower ("auto": the main one, if the tower fits there).
    - `main_gpu`: which of the devices is the main one, from 0.
    - `tensor_split`: shares of several devices (default: by free memory).
    - `kv_offload`: False keeps the KV cache in host memory.
    - `flash_attn`: flash attention on devices (default: if the device has it and precision is "fast").

    Pictures of LLaVA-1.6, which sees them whole and in tiles:

    - `image_max_tiles`: the most tiles of a picture (fewer are faster and show less; 0: the whole picture
      only).
    - `image_merge`: "unpad" as it was trained, or "flat", the rows that llama.cpp gives.

    Pictures of all models:

    - `image_cache_bytes`: of embeddings that are kept for further questions about the same pictures (0: none are).

    `progress` is called as progress(stage, fraction), in the model's own thread, with stage "load", "upload"
    (to a device), "encode" or "prefill"; it may return False to cancel.

    Raises FileNotFoundError, ModelFileError (damaged file), ModelMismatchError (parts that do not fit
    together), UnsupportedModelError, ModelMemoryError (it does not fit; the text gives the numbers). Use it
    in a ``with`` statement or call close(). It may be used from several threads. Their answers are computed
    together, a token of each in one step, up to n_parallel at once; the others wait, first come, first
    served. No answer depends on what is computed beside it.
    """

    def __new__(cls, *_: object, **named: object) -> Llava:
        check_call(f"{cls.__name__}()", cls.__init__, named, {"ask()": Options.__annotations__})
        return super().__new__(cls)

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
        precision: Precision | None = None,
        use_mmap: bool = True,
        type_k: CacheType | None = None,
        type_v: CacheType | None = None,
        image_max_tiles: int | None = None,
        image_merge: ImageMerge = "unpad",
        image_cache_bytes: int = _CACHED,
        n_parallel: int = 4,
        kv_cells: KvCells = None,
        progress: Progress | None = None,
    ) -> None:
        self._arguments = {
            name: value for name, value in locals().items() if name not in ("self", "progress")
        }
        rounded = precision or os.environ.get("PYLLAVA_PRECISION") or "fast"
        if rounded not in ("fast", "exact"):
            raise ValueError(f"precision: found {rounded!r}, need 'fast' or 'exact'")
        if image_merge not in ("unpad", "flat"):
            raise ValueError(f"image_merge: found {image_merge!r}, need 'unpad' or 'flat'")
        if image_max_tiles is not None and operator.index(image_max_tiles) < 0:
            raise ValueError(f"image_max_tiles: found {number_text(image_max_tiles)}, need 0 or more")
        if operator.index(image_cache_bytes) < 0:
            raise ValueError(f"image_cache_bytes: found {number_text(image_cache_bytes)}, need 0 or more")
        if isinstance(kv_cells, str) and kv_cells != "pictures":
            raise ValueError(f"kv_cells: found {kv_cells!r}, need a number or 'pictures'")
        if not 1 <= operator.index(n_parallel) <= _MOST_PARALLEL:
            raise ValueError(f"n_parallel: found {number_text(n_parallel)}, need 1..{_MOST_PARALLEL}")
        started = time.perf_counter()
        files = models.find(model, mmproj)
        self._progress = progress
        cells = kv_cells if isinstance(kv_cells, int) else 0
        session: dict[str, Any] = {
            "n_batch": n_batch,
            "n_threads": n_threads or 0,
            "type_k": type_k,
            "type_v": type_v,
            "precision": rounded,
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
                n_seq=_KEPT * n_parallel if cells else 1,  # of kv_cells, or n_ctx for the only one
                kv_cells=cells,
                **session,
            ),
        )
        self._engine = Engine(self, operator.attrgetter("_progress"))
        try:
            with models.explained(files):
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
            self._set_up(files, template, rounded, image_merge, image_max_tiles)
            self._open(session, n_parallel, n_ctx, kv_cells, image_cache_bytes)
            self._prompts = Prompts(self._model, self._pictures, self.template, self.n_ctx)
            self._scorer = Scorer(self._engine, self._prompts, self.n_ctx)
        except BaseException:
            self._engine.close()
            raise
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        *,
        quant: str | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Llava:
        """A model from the Hugging Face Hub: what is not in its cache is fetched first (``pip install 'pyllava[hub]'``).

        - `repo`: ``owner/name`` of a repository with GGUF files, a short name of ``pyllava-cli models``, or a path.
        - `quant`: "q8_0" and the like (default: q4_k_m, as llama.cpp's tools take it, else the best that fits in memory).
        - `revision`: a branch, a tag, or a commit (default: main, as it was when it was fetched).
        - `progress`: as above, with "fetch" and "verify" before the other stages.

        The other options are those above. Raises HubError where the repository cannot be reached or holds no model.
        """
        from . import hub

        files = hub.get(repo, quant=quant, revision=revision, progress=progress)
        options.setdefault("mmproj", files.mmproj)
        return cls(files.model, progress=progress, **options)

    # ------------------------------------------------------------------------------------------ life

    def _set_up(
        self,
        files: models.ModelFiles,
        template: str,
        precision: str,
        image_merge: str,
        image_max_tiles: int | None,
    ) -> None:
        self._model = self._engine.model
        self.is_demo = files.is_demo
        self.files = files
        self.info = self._model.info
        self.template: Template = self._choose_template(template, files)
        flat = image_merge == "flat" or self.info.aspect != "anyres"
        spec = spec_of(self.info, image_max_tiles)
        projector = None if files.mmproj is None else projector_of(files.mmproj)
        self._pictures = Pictures(self._engine, str(files.model), spec, projector, flat=flat)
        self._structures = _structured.Structures(self._model)
        self.precision = precision
        self.devices = self._model.devices

    def _open(
        self,
        options: dict[str, Any],
        n_parallel: int,
        n_ctx: int | None,
        kv_cells: KvCells,
        cache_bytes: int,
    ) -> None:
        """Creates the session, with sequences for n_parallel answers and as many that keep earlier ones."""
        trained, n_seq = self.info.n_ctx_train, _KEPT * n_parallel
        if n_ctx is not None and n_ctx > trained:
            _log.warning("n_ctx=%d: the model was trained for %d", n_ctx, trained)
        self.n_parallel = n_parallel
        on_host = self.devices.kv_on_host or self.devices.n_gpu_layers == 0
        to_try = rooms(
            n_ctx,
            kv_cells,
            trained=trained,
            on_host=on_host,
            n_parallel=n_parallel,
            n_picture=self._pictures.most_rows,
        )

        def session_of(room: Room) -> _lib.SessionHandle:
            views = self._pictures.most_views
            return _lib.SessionHandle(
                self._model, n_ctx=room.n_ctx, n_views=views, n_seq=n_seq, kv_cells=room.n_cells, **options
            )

        def open_session() -> None:
            for room in to_try:
                try:
                    session = session_of(room)
                    break
                except ModelMemoryError:  # the whole need not be there at once, but it must be there
                    if room.is_least:
                        raise
            self.n_ctx, self.kv_cells = room.n_ctx, room.kv_cells
            in_ranges = not on_host and any(name.startswith("CUDA") for name in self.devices.layers)
            least = SHARED_ON_CUDA if in_ranges else 1
            sequences = Sequences(session, n_seq, room.kv_cells, room.n_cells - room.kv_cells, least)
            self._engine.open(session, n_parallel, sequences, options["n_batch"], cache_bytes)

        self._engine.run(Call(open_session))
        self._session = self._engine.session

    def _choose_template(self, template: str, files: models.ModelFiles) -> Template:
        if template != "auto":
            return templates.by_name(template)
        metadata = self._model.metadata()
        told = metadata.get("pyllava.template")
        if told is not None:
            return templates.by_name(str(told))
        chat_template = metadata.get("tokenizer.chat_template")
        names = models.names_in(files.model, metadata)
        found = _template_choice.choose(names, str(chat_template) if chat_template else None, self._has_token)
        if found.doubt:
            _log.warning(
                "%s: %s; %s is used (%s): template= or --template names another of %s",
                *(files.model, found.doubt, found.name, found.why, ", ".join(templates.TEMPLATES)),
            )
        else:
            _log.info("%s: prompt template %s (%s)", files.model, found.name, found.why)
        chosen = templates.TEMPLATES[found.name]
        if found.name != "chatml":
            return chosen
        return dataclasses.replace(chosen, system=_template_choice.system_told(str(chat_template)))

    def _has_token(self, text: str) -> bool:
        """Whether a special token has this text."""
        ids = self._model.tokenize(text)
        return len(ids) == 1 and self._model.piece(ids[0], with_special=True) == text.encode()

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

    def __reduce__(self) -> tuple[Any, ...]:
        """As its arguments, paths made absolute, without `progress`: whoever unpickles it loads the model again."""
        arguments, files = dict(self._arguments), self.files
        if not files.is_demo:  # the demo's files lie elsewhere where the package does
            arguments["model"] = files.model.absolute()
            arguments["mmproj"] = files.mmproj and files.mmproj.absolute()
        return functools.partial(type(self), **arguments), ()

    def __copy__(self) -> Self:
        raise TypeError(
            "a model is not copied: pass this one on, which several threads may use, or load another"
        )

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def cancel(self) -> None:
        """Ends calls of other threads and unfinished streams with GenerationCancelled."""
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
        """The text of token ids, without a leading space that tokenize() adds; control tokens give none."""
        text = b"".join(self._model.piece(token) for token in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.info.space_prefix else text

    def token_text(self, token: int) -> str:
        """One token as people may read it, control tokens by their names; incomplete UTF-8 is replaced."""
        return self._model.piece(token, with_special=True).decode(errors="replace")

    def prompt_tokens(
        self, images: Images, prompt: str, *, raw: bool = False, system: str | None = None
    ) -> list[int | ImageMark]:
        """The prompt as the model gets it: token ids, and an ImageMark where an image's rows go."""
        parts = self._prompts.parts(prompt, len(listed(images)), raw, system)
        return joined(self._prompts.tokenized(parts))

    # ------------------------------------------------------------------------------------------ images

    def encode_image(self, image: ImageSource | ImageEmbedding) -> ImageEmbedding:
        """The embeddings of one image: a path, bytes, PIL image or array; or an ImageEmbedding, unchanged.

        They may be given in the place of the image, now or later (`ImageEmbedding.save`), to a model with the same projector.

        Raises ImageError where it cannot be read, PyllavaError where the model has no projector.
        """
        epoch = self._engine.epoch()
        return self._pictures.encode(self._pictures.look_at(image), epoch)

    def view(self, image: ImageSource, *, n_images: int = 1) -> ImageView:
        """What the model sees of an image: its views, their patches, which of them become rows. It draws, saves and shows itself.

        `n_images`: of how many in one prompt; LLaVA-OneVision sees several without tiles. Raises as encode_image().
        """
        from .view import view_of

        if operator.index(n_images) < 1:
            raise ValueError(f"n_images: found {number_text(n_images)}, need 1 or more")
        return view_of(self._pictures.picture(image, n_images), self._model)

    # ------------------------------------------------------------------------------------------ answers

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

    @overload
    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        stream: bool,
        raw: bool = ...,
        system: str | None = ...,
        **options: Unpack[Options],
    ) -> Answer | Stream: ...

    def ask(
        self,
        images: Images = None,
        prompt: str | None = None,
        *,
        stream: bool = False,
        raw: bool = False,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Answer | Stream:
        """Asks about one image, several in one prompt, or none (None: text only).

        - `images`: each is a path, the bytes of a file, a PIL image or an array.
        - `prompt`: the question. The images come before it, or at its ``<image>`` marks on lines of their own where there
          are as many of those as images; any other ``<image>`` is a word.
        - `raw`: the prompt is used as it stands, with an ``<image>`` mark for each image and special tokens in it,
          instead of through the model's template.
        - `system` replaces the template's system message.
        - `stream`: True gives a Stream of pieces instead of the whole Answer.

        Options, with their defaults:

        - max_tokens=512; stop=(): texts that end the answer.
        - temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, seed=None (random).
        - repeat_penalty=1.0, repeat_last_n=64 (-1: all); logit_bias={}: what is added to tokens' logits, by id or text.
        - the other ways of choosing a token: see `Sampling`.
        - start_with="": a text that the answer begins with; the model goes on from there.
        - timeout=None: seconds after which an answer ends, from when it is begun; stop_loops=False: True ends an answer that
          repeats itself, the same words at least four times. Its `finish_reason` says so.
        - logprobs=None: with N, ``answer.logprobs`` tells of each token how probable it was, and of the N most probable
          ones (0: of itself alone), in the model at temperature 1.
        - schema=None: a JSON schema (a dict or a text), True for any JSON, or a pydantic model; regex=None; choices=None: texts;
          grammar=None: GBNF or Lark. One of them says what the answer is, and ``answer.data`` what it says. See
          docs/structured.md; needs ``pip install 'pyllava[structured]'``.
        - reuse=True: what the model still holds of the prompt is not computed again. False computes the whole
          prompt, in a conversation earlier answers, too, whose positions otherwise stay as they were
          computed.

        Raises ImageError, ContextOverflowError where prompt and images do not fit in n_ctx, ValueError for a
        wrong argument, GenerationCancelled after cancel().
        """
        answer = self._asked(images, prompt, stream, raw, system, options)
        return answer if stream else answer.whole()

    def _asked(
        self,
        images: Images,
        prompt: str | None,
        stream: bool,
        raw: bool,
        system: str | None,
        options: Options,
    ) -> Stream:
        if prompt is None:
            raise without_prompt(images)
        check_order(images, prompt)
        return self._question(prompt, listed(images), raw, system, Sampling(**options), stream)

    def _question(
        self,
        prompt: str,
        images: Sequence[ImageSource | ImageEmbedding],
        raw: bool,
        system: str | None,
        sampling: Sampling,
        stream: bool,
    ) -> Stream:
        """The answer to a question without anything before it."""
        parts = self._prompts.parts(prompt, len(images), raw, system)
        stop, space = (RAW_STOP, "") if raw else (self.template.stop, self.template.answer_space)
        parts = templates.begun(parts, sampling.start, space)
        return self._answer(parts, images, stop, sampling, stream, space=space)

    create_chat_completion = _completion.create_chat_completion

    def batch(
        self,
        sources: Iterable[T],
        prompt: str | Callable[[T], str],
        *,
        load: Callable[[T], Images] | None = None,
        samples: int = 1,
        in_order: bool = True,
        n_ahead: int | None = None,
        raw: bool = False,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Generator[batch.Result[T], None, None]:
        """Asks about many pictures, as many at once as `n_parallel` says: yields a Result for each source.

        - `sources`: what ask() takes as `images`, each a question; or anything, with `load` to make that of it. They are
          taken one by one, in other threads, and not more than `n_ahead` of them before their results are read.
        - `prompt`: the question, or a function of the source that gives it.
        - `load`: called in other threads, while the model computes.
        - `samples`: answers to each question. With a seed, the seeds are those that follow it.
        - `in_order`: results come in the order of the sources; False gives each as soon as it is there.
        - `n_ahead`: sources under way and results that wait to be read, at most (default: 4 * n_parallel).
        - The rest as in ask().

        A source that fails gives a Result with its `error`; only what ends the model ends the batch: ClosedError, DeviceError,
        GenerationCancelled after cancel(), and an exception of `sources` itself. Closing the generator, or leaving it, gives
        up what is under way. A model made with ``kv_cells="pictures"`` has room for n_parallel of them.
        """
        check_sources(sources, prompt)
        sampling = Sampling(**options)
        if operator.index(samples) < 1:
            raise ValueError(f"samples: found {number_text(samples)}, need 1 or more")
        if n_ahead is not None and operator.index(n_ahead) < 1:
            raise ValueError(f"n_ahead: found {number_text(n_ahead)}, need 1 or more")
        if want := _structured.wanted(sampling):  # its errors are no picture's
            self._structures.constraint(want, sampling.start, "" if raw else self.template.answer_space)

        def ask(source: T, whole: batch.Running) -> tuple[Answer, ...]:
            epoch = self._engine.epoch()
            given = listed(load(source) if load is not None else source)  # type: ignore[arg-type]
            question = prompt if isinstance(prompt, str) else prompt(source)
            pictures = [self._pictures.look_at(image, len(given)) for image in given]
            started = time.perf_counter()
            images = [self._pictures.encode(picture, epoch, keep=False) for picture in pictures]
            seconds = time.perf_counter() - started
            answers = []
            for number in range(samples):
                seed = sampling.seed if sampling.seed is None else sampling.seed + number
                drawn = dataclasses.replace(sampling, seed=seed)
                answer = whole(self._question(question, images, raw, system, drawn, stream=False))
                timings = dataclasses.replace(answer.timings, encode=0.0 if number else seconds)
                answers.append(dataclasses.replace(answer, timings=timings))
            return tuple(answers)

        n_threads = 2 * self.n_parallel
        most = 2 * n_threads if n_ahead is None else n_ahead
        return batch.results(ask, sources, n_threads=min(n_threads, most), n_ahead=most, in_order=in_order)

    def _answer(
        self,
        parts: Sequence[Part],
        images: Sequence[ImageSource | ImageEmbedding],
        stop: Sequence[str],
        sampling: Sampling,
        stream: bool,
        before: Script | None = None,
        remember: Callable[[Prompt, Answer], None] | None = None,
        exact: str | None = None,
        space: str = "",
    ) -> Stream:
        """An answer, computed when it is asked for. Without `stream` it has no pieces.

        `before`: the script of a conversation so far. `remember` is called with prompt and answer. `exact`: see
        `Limits`. `space`: what stands before answers in the template.
        """
        if (sampling.logprobs or 0) > self.info.n_vocab:
            raise ValueError(
                f"logprobs: found {number_text(sampling.logprobs or 0)}, need 0..{self.info.n_vocab}, one for each token"
            )
        epoch = self._engine.epoch()
        want = _structured.wanted(sampling)
        constraint = self._structures.constraint(want, sampling.start, space) if want else None
        prompt = self._prompts.prepare(self._prompts.tokenized(parts), images, self.n_ctx - 1, epoch)
        if not len(prompt):
            raise ValueError("empty prompt")
        if before is not None and sampling.reuse:
            prompt.script = prompt.script.after(before)
        job = Answering(
            prompt.script,
            self._model,
            lambda: sampling.sampler(self._model, self.n_ctx),
            () if constraint else (*stop, *sampling.stop),
            min(sampling.max_tokens, self.n_ctx - len(prompt)),
            reuse=sampling.reuse,
            stream=stream,
            limits=Limits(
                sampling.start, sampling.timeout or float("inf"), sampling.stop_loops, exact, constraint
            ),
            n_alternatives=sampling.logprobs or 0,
        )
        written = self._engine.pieces(job, epoch)
        with_logprobs = sampling.logprobs is not None
        if with_logprobs:
            written = self._told(written, job)
        pieces = self._pieces(written, prompt, remember, want, with_logprobs=with_logprobs)

        def watch(notify: Callable[[], None]) -> None:
            job.notify = notify

        return Stream(prompt.usage(), pieces, lambda: self._engine.cancel(job), watch)

    def _pieces(
        self,
        pieces: Generator[str, None, Written],
        prompt: Prompt,
        remember: Callable[[Prompt, Answer], None] | None,
        want: _structured.Wanted | None,
        *,
        with_logprobs: bool,
    ) -> Generator[str, None, Answer]:
        written = yield from pieces
        timings = Timings(
            self.load_seconds, prompt.encode_seconds, written.prefill, written.decode, written.wait
        )
        usage = prompt.usage(written.n_cached, len(written.tokens), written.n_forced)
        answer = Answer(
            written.text,
            usage,
            timings,
            written.reason,
            written.tokens,
            written.log_probs,
            self._logprobs(written) if with_logprobs else (),
            want.parse(written.text) if want and written.is_whole else None,
        )
        _log_answer(answer, written)
        if remember is not None:
            remember(prompt, answer)
        return answer

    def _told(self, pieces: Generator[str, None, Written], job: Answering) -> Generator[str, None, Written]:
        """The pieces of an answer, each with entries for its tokens."""
        n_told = 0
        with contextlib.closing(pieces):
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    return cast(Written, end.value)
                if isinstance(piece, StreamPiece):
                    piece.logprobs = self._logprobs(job, slice(n_told, piece.n_tokens))
                    n_told = piece.n_tokens
                yield piece

    def _logprobs(self, of: Answering | Written, part: slice = slice(None)) -> tuple[TokenLogprob, ...]:
        """An entry for each token of an answer, or of a part of it."""
        entries = zip(of.tokens[part], of.log_probs[part], of.alternatives[part], strict=True)
        return tuple(token_logprob(self._model, *entry) for entry in entries)

    def score(
        self,
        images: Images,
        prompt: str,
        choices: Sequence[str],
        *,
        normalize: Normalize = "sum",
        with_end: bool = True,
        logprobs: int = 0,
        start_with: str = "",
        raw: bool = False,
        system: str | None = None,
    ) -> Scores:
        """The probability of each of `choices`, given that one of them is the answer: the values sum to one.

        - `choices`: two or more different answers. Each is taken as the model would write it behind the prompt.
        - `normalize`: "sum" compares the probabilities of the answers, "mean" the geometric means of those of their
          tokens, which does not favour short answers.
        - `with_end`: an answer counts with its end, so that "red" is not also the beginning of "red and blue".
        - `logprobs`: alternatives that each token's entry names, in `loglikelihoods` of the result.
        - `start_with`: a text that stands before each of them.
        - The rest as in ask().

        The prompt is computed once, and then the rows of each choice.
        """
        check_order(images, prompt, "score")
        question = Question(prompt, listed(images), start_with, raw, system)
        found = self._scorer.score(question, choices, normalize, with_end=with_end, n_alternatives=logprobs)
        found.timings = dataclasses.replace(found.timings, load=self.load_seconds)
        return found

    def loglikelihood(
        self,
        images: Images,
        prompt: str,
        answer: str | Sequence[int],
        *,
        with_end: bool = False,
        logprobs: int = 0,
        start_with: str = "",
        raw: bool = False,
        system: str | None = None,
    ) -> Loglikelihood:
        """How probable the model finds a given answer, and each of its tokens: what ask() would report of them.

        - `answer`: a text, or token ids.
        - `with_end`: the end of the answer counts, too.
        - `logprobs`: alternatives that each token's entry names.
        - The rest as in score().
        """
        check_order(images, prompt, "loglikelihood")
        question = Question(prompt, listed(images), start_with, raw, system)
        return self._scorer.loglikelihood(question, answer, with_end=with_end, n_alternatives=logprobs)

    def explain(
        self,
        images: Images,
        prompt: str,
        answer: str | Sequence[int] | None = None,
        *,
        index: int = 0,
        covered: Covered = "all",
        windows: int = _explain.MOST_WINDOWS,
        announce: Callable[[Cost], object] | None = None,
        start_with: str = "",
        raw: bool = False,
        system: str | None = None,
    ) -> HeatMap:
        """Which places of a picture an answer depends on: how far its log-probability falls where they are covered.

        - `answer`: a text, or token ids (default: what ask() answers, of at most 64 tokens).
        - `index`: which of the images, from 0.
        - `covered`: "all" rows that show a place, those of the "overview" alone, or of the "tiles" alone.
        - `windows`: how many at most; each costs about half a prompt.
        - `announce`: called with the Cost once this is known: before all windows but one. An exception ends it.
        - The rest as in score().
        """
        check_order(images, prompt, "explain")
        given = listed(images)
        question = Question(prompt, given, start_with, raw, system)
        if not 0 <= operator.index(index) < len(given):
            raise ValueError(f"index: found {index}, there are {len(given)} images, counted from 0")
        picture = self._pictures.look_at(given[index], len(given))
        if isinstance(picture, ImageEmbedding):
            raise TypeError(
                "explain() draws over the picture: found an ImageEmbedding, need the picture itself"
            )
        if answer is None:
            options: Options = {"max_tokens": _EXPLAINED, "start_with": start_with}
            answer = self.ask(given, prompt, raw=raw, system=system, **options).tokens
        return _explain.explain(
            self._scorer,
            question,
            answer,
            picture,
            index=index,
            covered=covered,
            most=windows,
            announce=announce,
        )

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

        - `prompt`: a question as in ask(), or the model's input itself: token ids and ImageMarks, as
          prompt_tokens() gives them (no BOS is added). The positions are those of BOS, text and image rows.
        - `answer`: token ids that follow, computed as rows of an answer, as in generation; their positions
          come last.
        """
        given, ids = listed(images), self._checked(answer)
        epoch = self._engine.epoch()
        if isinstance(prompt, str):
            texts = self._prompts.tokenized(self._prompts.parts(prompt, len(given), raw, system))
        else:
            texts = stretches_of(prompt)
            self._checked([token for part in texts if isinstance(part, list) for token in part])
        if not texts:
            raise ValueError("empty prompt")
        prepared = self._prompts.prepare(texts, given, self.n_ctx - len(ids), epoch)
        return self._engine.run(Score(prepared.script.followed_by(ids), self.info.n_vocab), epoch)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        return checked_ids(ids, self.info.n_vocab)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation: later questions remember earlier questions, answers and images."""
        if not isinstance(system, str | None):
            raise TypeError(
                f"chat(system): found {type(system).__name__}, need a text; add() brings earlier questions and answers"
            )
        return Chat(self, system)


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
