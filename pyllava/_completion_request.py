"""Requests in the dictionaries of the OpenAI API, with the parameters that llama-cpp-python has for them, in our terms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypedDict

from .images import ImageSource
from .sampling import Sampling, check_number
from .templates import Message

Messages: TypeAlias = Sequence[Mapping[str, Any]]
LoadImage: TypeAlias = Callable[[str], ImageSource]


# --- parameters ---


class _DrawingOptions(TypedDict, total=False):
    """Defaults and meaning in `_Drawing`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    stop: str | Sequence[str] | None
    seed: int | None
    max_tokens: int | None
    presence_penalty: float
    frequency_penalty: float
    repeat_penalty: float
    repeat_last_n: int | None
    tfs_z: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    model: str | None
    logits_processor: None
    grammar: None
    logit_bias: Mapping[int | str, float] | None


class ChatOptions(_DrawingOptions, total=False):
    """The keyword arguments of create_chat_completion; defaults and meaning in `ChatRequest`."""

    functions: None
    function_call: str | None
    tools: None
    tool_choice: str | None
    response_format: Mapping[str, Any] | None
    logprobs: bool | None
    top_logprobs: int | None
    timeout: float | None
    stop_loops: bool


class TextOptions(_DrawingOptions, total=False):
    """The keyword arguments of create_completion; defaults and meaning in `TextRequest`."""

    suffix: None
    logprobs: int | None
    echo: bool
    stopping_criteria: None


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """How an answer is made. What would be of no effect must be left out: it raises ValueError."""

    temperature: float
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    typical_p: float = 1.0
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    """None and -1: another one each time."""
    max_tokens: int | None
    """None, 0 and less: as many as the context has room for."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int | None = None
    """None: 64, or `last_n_tokens_size` of ``compat.Llama``."""
    tfs_z: float = 1.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    model: str | None = None
    """What the result calls the model; None: the name of its file."""
    logits_processor: None = None
    grammar: None = None
    logit_bias: Mapping[int | str, float] | None = None
    """By token ids, which may be texts as in JSON."""

    def __post_init__(self) -> None:
        for option in fields(self):
            check_number(option.name, getattr(self, option.name), str(option.type))
        if not isinstance(self.logit_bias, Mapping | None):
            raise TypeError(f"logit_bias: found {self.logit_bias!r:.80}, need a dict of token ids")
        if self.tfs_z != 1.0:
            raise ValueError(f"tfs_z: found {self.tfs_z}, need 1.0: there is no tail-free sampling")
        self._refuse("logits_processor", "grammar")

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(f"{name}: pyllava has nothing of the kind: leave it out")

    def sampling(self, n_ctx: int, **others: Any) -> Sampling:
        """The same in the terms of ``ask``."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return Sampling(
            max_tokens=n_ctx if self.max_tokens is None or self.max_tokens <= 0 else self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            typical_p=self.typical_p,
            stop=stop,
            seed=None if self.seed == -1 else self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=64 if self.repeat_last_n is None else self.repeat_last_n,
            mirostat=self.mirostat_mode,
            mirostat_tau=self.mirostat_tau,
            mirostat_eta=self.mirostat_eta,
            logit_bias={_token_id(key): bias for key, bias in (self.logit_bias or {}).items()},
            **others,
        )


def _token_id(key: int | str) -> int:
    try:
        return int(key) if isinstance(key, str) else operator.index(key)
    except ValueError:
        raise ValueError(f"logit_bias: found {key!r:.80}, need token ids: tokenize() gives them") from None


@dataclass(frozen=True, kw_only=True)
class ChatRequest(_Drawing):
    """The parameters of create_chat_completion but for its messages and `stream`."""

    temperature: float = 0.2
    max_tokens: int | None = None
    functions: None = None
    function_call: str | None = None
    tools: None = None
    tool_choice: str | None = None
    response_format: Mapping[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    timeout: float | None = None
    """As in ``ask``, and so is `stop_loops`: the answer's finish_reason is then "length"."""
    stop_loops: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse("functions", "tools")
        for name in ("function_call", "tool_choice"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise ValueError(f"{name}: pyllava calls no tools: leave it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=True")
        schema_of(self.response_format)  # ValueError for what is none

    def in_our_terms(self, n_ctx: int) -> Sampling:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        schema = schema_of(self.response_format)
        return self.sampling(
            n_ctx, logprobs=logprobs, timeout=self.timeout, stop_loops=self.stop_loops, schema=schema
        )


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that a ``response_format`` asks for; None: any text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    inner = response_format.get("json_schema") if kind == "json_schema" else response_format
    found = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object" and found is None:
        return {"type": "object"}
    if kind in ("json_object", "json_schema") and isinstance(found, Mapping):
        return found
    raise ValueError(
        f"response_format: found {response_format!r:.80}, need type 'text', 'json_object' (with or without a schema) or "
        "'json_schema' with a schema in json_schema"
    )


@dataclass(frozen=True, kw_only=True)
class TextRequest(_Drawing):
    """The parameters of create_completion but for its prompt and `stream`."""

    temperature: float = 0.8
    max_tokens: int | None = 16
    suffix: None = None
    logprobs: int | None = None
    echo: bool = False
    stopping_criteria: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse("suffix", "stopping_criteria")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs: the tokens of the prompt have no logprobs here")


# --- messages ---


@dataclass(frozen=True)
class Conversation:
    """Messages of a request in the terms of the templates."""

    messages: list[Message]
    images: list[ImageSource]
    """Of all messages, in their order."""
    system: str | None
    """None: the template's own."""


def conversation(
    given: Messages, load_image: LoadImage | None = None, *, is_tiled: bool = False
) -> Conversation:
    """What `messages` say. `load_image` makes a picture of a text that names one. `is_tiled`: the model has a detail to choose.

    Raises ValueError, with the place, for all that would not reach the model as it is meant.
    """
    messages: list[Message] = []
    images: list[ImageSource] = []
    system: str | None = None
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        role, parts = _checked(where, message)
        texts = [part for part in parts if isinstance(part, str)]
        shown = [
            _image(where, part["image_url"], load_image, is_tiled)
            for part in parts
            if not isinstance(part, str)
        ]
        if role == "system":
            if number or shown:
                raise ValueError(f"{where}: need the system message first, and no picture in it")
            system = "".join(texts)
            continue
        wanted: Literal["user", "assistant"] = "assistant" if len(messages) % 2 else "user"
        if role != wanted:
            raise ValueError(
                f"{where}: found role {role!r:.40}, need {wanted!r}: users and assistant take turns"
            )
        if shown and role != "user":
            raise ValueError(f"{where}: found a picture, which only users can show")
        messages.append(Message(wanted, "".join(texts), len(shown)))
        images += shown
    if len(messages) % 2 == 0:
        raise ValueError(f"messages: found {len(given)}, need the user's as the last one")
    return Conversation(messages, images, system)


def _checked(where: str, message: Mapping[str, Any]) -> tuple[str, list[str | Mapping[str, Any]]]:
    """Role and parts of a message: texts, and what is of type image_url."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{where}: found {type(message).__name__}, need a dict")
    for key, value in message.items():
        if key not in ("role", "content") and value:
            raise ValueError(f"{where}: found {key!r:.40}, need nothing but role and content")
    content = message.get("content")
    if isinstance(content, str):
        return str(message.get("role")), [content]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content: found {type(content).__name__}, need a text or a list of parts")
    return str(message.get("role")), [_part(f"{where}: content[{i}]", part) for i, part in enumerate(content)]


def _part(where: str, part: Any) -> str | Mapping[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image_url" and part.get("image_url") is not None:
        return dict(part)
    raise ValueError(f"{where}: found {kind!r:.40}, need a text or an image_url, with what its type names")


def _image(where: str, found: Any, load_image: LoadImage | None, is_tiled: bool) -> ImageSource:
    """A picture: what stands in image_url, be it a text, a dict with it, or anything else that ``ask`` takes."""
    if isinstance(found, Mapping):
        detail = found.get("detail") or "auto"
        if detail not in ("auto", "high", "low"):
            raise ValueError(f"{where}: detail: found {detail!r:.40}, need 'auto', 'high' or 'low'")
        if detail == "low" and is_tiled:
            raise ValueError(
                f"{where}: detail 'low': say so when the model is loaded, with image_max_tiles=0"
            )
        found = found.get("url")
    if found is None or (isinstance(found, str) and not found):
        raise ValueError(f"{where}: image_url: need a data: URL, a path, bytes or a picture")
    source: ImageSource = load_image(found) if load_image is not None and isinstance(found, str) else found
    return source
