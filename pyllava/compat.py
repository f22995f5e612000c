"""For code written against llama-cpp-python: `Llama` and the chat handlers of LLaVA models, by its names and with its defaults.

    from pyllava.compat import Llama, Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path="mmproj.gguf")
    llm = Llama(model_path="model.gguf", chat_handler=handler, n_ctx=2048)
    llm.create_chat_completion(messages=[...])

What cannot be honoured raises ValueError. docs/compat.md says what differs.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from ._completion import Dictionary, chat_reply, text_reply
from ._completion_request import ChatOptions, ChatRequest, Messages, TextOptions, TextRequest
from .formats import FORMATS, CacheType
from .images import ImageSource
from .llava import Llava
from .templates import TEMPLATES

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Llama", "Llava15ChatHandler", "Llava16ChatHandler", "MTMDChatHandler", "NanoLlavaChatHandler"]

AnyRequest = TypeVar("AnyRequest", ChatRequest, TextRequest)
_DEFAULT_SEED = 0xFFFFFFFF  # llama.cpp's word for "another one each time"
_SPLIT_BY_LAYERS = 1
_CHAT_FORMATS: Mapping[str, str] = {
    "llava-1-5": "auto",
    "llava-1-6": "auto",
    "mtmd": "auto",
    "vicuna": "vicuna_v1",
    "mistral-instruct": "mistral_instruct",
    "llama-3": "llama_3",
    "qwen": "chatml",
}

# Parameters of Llama that change what is computed, and the values that they must have here.
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "split_mode": (_SPLIT_BY_LAYERS,),
    "vocab_only": (False,),
    "kv_overrides": (None, {}),
    "rope_scaling_type": (None, -1),
    "pooling_type": (-1,),
    "attention_type": (-1,),
    "rope_freq_base": (0.0,),
    "rope_freq_scale": (0.0,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0, -1.0),
    "yarn_beta_fast": (32.0, -1.0),
    "yarn_beta_slow": (1.0, -1.0),
    "yarn_orig_ctx": (0,),
    "embedding": (False,),
    "lora_base": (None,),
    "lora_scale": (1.0,),
    "lora_path": (None,),
    "draft_model": (None,),
    "tokenizer": (None,),
    "spm_infill": (False,),
}

# Those that change no result, whatever they are.
_WITHOUT_EFFECT = frozenset(
    (
        "logits_all",
        "n_threads_batch",
        "n_ubatch",
        "no_perf",
        "numa",
        "op_offload",
        "swa_full",
        "use_mlock",
        "verbose",
    )
)


class Llava15ChatHandler:
    """Names the projector of a LLaVA model. The prompt is the one that the model was trained with, told by its file."""

    template: ClassVar[str] = "auto"
    """What the prompt is made with, see ``Llava``."""

    def __init__(self, clip_model_path: str | os.PathLike[str], verbose: bool = True) -> None:
        """`verbose` has no effect."""
        self.clip_model_path = clip_model_path

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str, *, verbose: bool = True, **places: Any) -> Self:
        """With a projector of the Hugging Face Hub: the one file that `filename`, a pattern, names."""
        return cls(_fetched(repo_id, filename, **places), verbose)

    def load_image(self, image_url: str) -> ImageSource:
        """The picture that a message names. Override it to fetch what lies in the web: by default, nothing is."""
        return image_url


class Llava16ChatHandler(Llava15ChatHandler):
    """As Llava15ChatHandler: what is particular to LLaVA-1.6 stands in its files."""


class MTMDChatHandler(Llava15ChatHandler):
    """As Llava15ChatHandler."""


class NanoLlavaChatHandler(Llava15ChatHandler):
    """Names the projector of nanoLLaVA."""

    template = "nanollava"


class Llama:
    """A language model, with a projector if a chat handler names one, under the names that llama-cpp-python has for it.

    All parameters but the first are given by name. Those that change no result are taken and have no effect:
    logits_all, n_threads_batch, n_ubatch, no_perf, numa, op_offload, swa_full, use_mlock, verbose. Others that are not
    named here raise ValueError unless they have llama-cpp-python's default. `llava` is the model by our own names.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        chat_handler: Llava15ChatHandler | None = None,
        chat_format: str | None = None,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        use_mmap: bool = True,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        seed: int = _DEFAULT_SEED,
        last_n_tokens_size: int = 64,
        **others: Any,
    ) -> None:
        _check(others)
        if not isinstance(chat_handler, Llava15ChatHandler | None):
            found = type(chat_handler).__name__
            raise TypeError(
                f"chat_handler: found {found}, need a handler of pyllava.compat, or one derived from it"
            )
        self.model_path = os.fspath(model_path)
        self.chat_handler = chat_handler
        self.chat_format = chat_format
        self.last_n_tokens_size = last_n_tokens_size
        self.set_seed(seed)
        self.llava = Llava(
            model_path,
            chat_handler.clip_model_path if chat_handler is not None else None,
            n_ctx=n_ctx or None,
            n_batch=n_batch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
            kv_offload=offload_kqv,
            flash_attn=flash_attn,
            use_mmap=use_mmap,
            type_k=_type_name("type_k", type_k),
            type_v=_type_name("type_v", type_v),
            template=_template(chat_format, chat_handler),
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        *,
        additional_files: Sequence[str] | None = None,
        local_dir: None = None,
        local_dir_use_symlinks: object = "auto",
        cache_dir: None = None,
        **options: Any,
    ) -> Self:
        """With a model of the Hugging Face Hub: the one file that `filename`, a pattern, names, and those of `additional_files`,
        such as the other parts of a split model. The other options are those above.
        """
        places = {"local_dir": local_dir, "cache_dir": cache_dir}
        for pattern in additional_files or ():
            _fetched(repo_id, pattern, **places)
        return cls(_fetched(repo_id, filename, **places), **options)

    # ------------------------------------------------------------------------------------------ answers

    def create_chat_completion(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> Dictionary | Iterator[Dictionary]:
        """As ``Llava.create_chat_completion``; the model's name is its path."""
        request = self._with_own(ChatRequest(**options))
        load_image = self.chat_handler.load_image if self.chat_handler is not None else None
        return chat_reply(self.llava, messages, stream, request, load_image).result(stream)

    def create_completion(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[TextOptions]
    ) -> Dictionary | Iterator[Dictionary]:
        """Goes on with a text as it stands, in which special tokens are recognised, or with token ids."""
        request = self._with_own(TextRequest(**options))
        return text_reply(self.llava, prompt, stream, request).result(stream)

    __call__ = create_completion

    def create_chat_completion_openai_v1(
        self, messages: Messages, *, stream: bool = False, **options: Any
    ) -> Any:
        """As create_chat_completion, in the types of the package openai."""
        try:
            types = importlib.import_module("openai.types.chat")
        except ImportError:
            raise ImportError("the types of the package openai are needed: pip install openai") from None
        found = self.create_chat_completion(messages, stream=stream, **options)
        if isinstance(found, dict):
            return types.ChatCompletion.model_validate(found)
        return map(types.ChatCompletionChunk.model_validate, found)

    def _with_own(self, request: AnyRequest) -> AnyRequest:
        """A request with what this object says where it says nothing."""
        return dataclasses.replace(
            request,
            seed=self._seed if request.seed is None else request.seed,
            model=request.model or self.model_path,
            repeat_last_n=self.last_n_tokens_size if request.repeat_last_n is None else request.repeat_last_n,
        )

    def set_seed(self, seed: int) -> None:
        """The seed of calls that name none; -1 and 2**32 - 1: another one each time."""
        self._seed = None if seed in (-1, _DEFAULT_SEED) else seed

    # ------------------------------------------------------------------------------------------ vocabulary

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8. `special`: ``</s>`` and the like are tokens, not letters."""
        add_bos = add_bos and self.llava.info.add_bos
        return self.llava.tokenize(text.decode(), add_bos=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of token ids; `special`: with the names of special tokens. `prev_tokens` changes nothing."""
        text = b"".join(self.llava._model.piece(token, with_special=special) for token in tokens)
        begins = list(tokens[:1]) == [self.token_bos()] and not special
        return text.removeprefix(b" ") if begins else text

    def n_ctx(self) -> int:
        return self.llava.n_ctx

    def n_embd(self) -> int:
        return self.llava.info.n_embd

    def n_vocab(self) -> int:
        return self.llava.info.n_vocab

    def token_bos(self) -> int:
        return self.llava.info.bos_id

    def token_eos(self) -> int:
        return self.llava.info.eos_id

    # ------------------------------------------------------------------------------------------ life

    def reset(self) -> None:
        """Nothing: no call depends on an earlier one."""

    def close(self) -> None:
        self.llava.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _MUST_BE:
            raise TypeError(f"Llama() has no parameter {name!r}")
        if value not in _MUST_BE[name]:
            raise ValueError(f"{name}: found {value!r:.80}, need {_MUST_BE[name][0]!r}: pyllava has no other")


def _fetched(
    repo_id: str,
    pattern: str,
    *,
    local_dir: None = None,
    local_dir_use_symlinks: object = "auto",
    cache_dir: None = None,
) -> Path:
    """A file in the Hub's cache, fetched if it is not there."""
    from ._hub_client import fetch, listing

    if local_dir is not None or cache_dir is not None:
        raise ValueError(
            "local_dir, cache_dir: the environment says where the cache is (HF_HOME): leave them out"
        )
    files = listing(repo_id, None).files
    found = fnmatch.filter(files, pattern)
    if len(found) != 1:
        raise ValueError(
            f"{repo_id}: {len(found)} files for {pattern!r}, need one of {', '.join(files)[:500]}"
        )
    return fetch(files[found[0]], lambda stage, n_bytes: None)


def _type_name(parameter: str, kind: int | str | None) -> CacheType | None:
    """A number format by its name; llama-cpp-python has numbers for them."""
    if not isinstance(kind, int):
        return cast("CacheType | None", kind)  # Llava looks at it
    for known in FORMATS.values():
        if known.id == kind:
            return cast("CacheType", str(known))
    raise ValueError(f"{parameter}: found {kind}, which is the number of no format")


def _template(chat_format: str | None, handler: Llava15ChatHandler | None) -> str:
    if handler is not None:  # as llama-cpp-python: it goes before the format
        return handler.template
    if chat_format is None:
        return "auto"
    template = _CHAT_FORMATS.get(chat_format, chat_format)
    if template not in ("auto", *TEMPLATES):
        raise ValueError(
            f"chat_format: found {chat_format!r:.80}, need one of {', '.join([*_CHAT_FORMATS, *TEMPLATES])}"
        )
    return template
