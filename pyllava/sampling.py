"""The options of an answer: one row for each, in the order of ``pyllava_sampler_params``."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from . import _lib
from ._lib.values import number_text


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
    start_with: str
    timeout: float | None
    stop_loops: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, when an answer ends, and whether rows that the model still holds are reused."""

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
    start_with: str = ""
    timeout: float | None = None
    stop_loops: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError("stop: found a text, need a list of texts")
        operator.index(self.max_tokens)  # TypeError for anything but an integer
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {number_text(self.max_tokens)}, need 1 or more")
        if not isinstance(self.start_with, str):
            raise TypeError(f"start_with: found {type(self.start_with).__name__}, need a text")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: found {number_text(self.timeout)}, need seconds above 0, or None")

    @property
    def start(self) -> str:
        """`start_with` without spaces at its end: the token that follows brings its own."""
        return self.start_with.rstrip(" ")

    def sampler(self, model: _lib.ModelHandle, n_ctx: int) -> _lib.SamplerHandle:
        """The sampler of one answer, from the fields of the same names."""
        numbers = {name: getattr(self, name) for name in _lib.SAMPLER_FIELDS}
        if self.repeat_last_n < 0:
            numbers["repeat_last_n"] = n_ctx
        if self.seed is None:
            numbers["seed"] = secrets.randbits(64)
        return _lib.SamplerHandle(model, **numbers)
