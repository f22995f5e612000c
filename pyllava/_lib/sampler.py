"""Sampling: from logits to a token."""

from __future__ import annotations

import ctypes as c
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .functions import _BOOL, _I32, _P, _TEXT, _U64, _Bias, _Choice, _Run, _SamplerParams
from .handle import _Handle
from .load import _check, lib
from .model import ModelHandle
from .values import FloatArray, _i32, _pointer, _real


@dataclass(frozen=True)
class Choice:
    """A token and its log-probability in the model itself, before any stage of the sampler."""

    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """(id, log_prob) of the tokens that the model finds most probable, as many as were asked for."""


@dataclass(frozen=True)
class _Asked:
    """Buffers of a sampler for some steps: the mask that it reads, the choices that it writes."""

    mask: npt.NDArray[np.uint32] | None
    choices: Any
    """[n_steps]"""
    alternatives: Any
    """[n_steps * n_alternatives]"""
    n_alternatives: int

    def choice(self, step: int) -> Choice:
        found, n = self.choices[step], self.n_alternatives
        others = self.alternatives[step * n : (step + 1) * n]
        return Choice(found.id, found.log_prob, tuple((other.id, other.log_prob) for other in others))


_KINDS: dict[str, Any] = {name: kind for name, kind, *_ in _SamplerParams._fields_}
SAMPLER_FIELDS: tuple[str, ...] = tuple(name for name in _KINDS if not name.startswith("n_"))

_NEUTRAL: dict[
    str, Any
] = {  # values that change nothing, where 0 would; and what stages need once they are on
    "dynatemp_exponent": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "xtc_threshold": 0.1,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 64,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
}


def _field(name: str, value: Any) -> dict[str, Any]:
    """Fields of ``pyllava_sampler_params`` for a value: of a list, its count too. A seed is cut to 64 bits."""
    kind = _KINDS[name]
    if kind is _U64:
        return {name: operator.index(value) & (2**64 - 1)}
    if kind is _BOOL:
        return {name: bool(value)}
    if name == "logit_bias":
        biases = [_Bias(_i32(name, token), _real(name, bias)) for token, bias in value]
        return {name: (_Bias * len(biases))(*biases), f"n_{name}": len(biases)}
    if kind is c.POINTER(_TEXT):
        texts = [_words(name, text) for text in value]
        return {name: (_TEXT * len(texts))(*texts), f"n_{name}": len(texts)}
    return {name: _i32(name, value) if kind is _I32 else _real(name, value)}


def _words(name: str, text: Any) -> bytes:
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"{name}: found {text!r}, need texts")
    return text.encode()


class SamplerHandle:
    """Random state and the recent tokens of one answer, for the vocabulary of one model."""

    def __init__(self, model: ModelHandle, **options: Any) -> None:
        """`options`: fields of ``pyllava_sampler_params`` (SAMPLER_FIELDS); one that is missing or None changes
        nothing. Lists are sequences, that of `logit_bias` of (token id, bias).
        """
        if wrong := options.keys() - set(SAMPLER_FIELDS):
            raise TypeError(f"no option of a sampler: {', '.join(sorted(wrong))}")
        params = _SamplerParams()
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in (_NEUTRAL | given).items():
            for field, packed in _field(name, value).items():
                setattr(params, field, packed)
        address, self._n_vocab = _P(), model.info.n_vocab
        with model.handle.use() as at:
            _check(lib.pyllava_sampler_create(at, c.byref(params), c.byref(address)))
        self._handle = _Handle("pyllava_sampler_free", address.value)

    def sample(
        self,
        logits: FloatArray,
        *,
        mask: npt.NDArray[np.uint32] | None = None,
        n_alternatives: int = 0,
    ) -> Choice:
        """Chooses a token from logits float32 [n_vocab].

        mask: uint32 [(n_vocab + 31) // 32]; a token may be chosen if bit id % 32 of word id // 32 is set.
        Raises ValueError if no token is left.
        """
        logits = self._sized("logits", logits, np.float32, self._n_vocab)
        run = _Run()
        asked = self.ask(run, mask, n_alternatives)
        with self._handle.use() as at:
            status = lib.pyllava_sample(
                at, _pointer(logits), run.mask, n_alternatives, run.choice, run.alternatives
            )
        _check(status)
        return asked.choice(0)

    def take(self, logits: FloatArray, token: int, *, n_alternatives: int = 0) -> Choice:
        """As sample(), where no other token may be chosen."""
        mask = np.zeros((self._n_vocab + 31) // 32, np.uint32)
        mask[token // 32] = np.uint32(1) << np.uint32(token % 32)
        return self.sample(logits, mask=mask, n_alternatives=n_alternatives)

    @property
    def handle(self) -> _Handle:
        return self._handle

    def ask(
        self, run: _Run, mask: npt.NDArray[np.uint32] | None, n_alternatives: int, n_steps: int = 1
    ) -> _Asked:
        """Sets a run's buffers for the choices of `n_steps` steps; keep the result until they are made."""
        if mask is not None and mask.dtype != np.uint32:
            raise ValueError(f"mask: found {mask.dtype}, need uint32")
        n_words = (self._n_vocab + 31) // 32  # a copy: it is read after the computation
        words = None if mask is None else self._sized("mask", mask, np.uint32, n_words).copy()
        if not 0 <= n_alternatives <= self._n_vocab:  # before memory for them is taken
            raise ValueError(f"n_alternatives: found {n_alternatives}, need 0..{self._n_vocab}")
        out, others = (_Choice * n_steps)(), (_Choice * (n_alternatives * n_steps))()
        run.mask = None if words is None else _pointer(words)
        run.choice, run.alternatives, run.n_alternatives = out, others, n_alternatives
        return _Asked(words, out, others, n_alternatives)

    @staticmethod
    def _sized(name: str, array: npt.NDArray[Any], dtype: Any, n: int) -> npt.NDArray[Any]:
        if array.shape != (n,):
            raise ValueError(f"{name}: shape {array.shape}, need ({n},)")
        return np.ascontiguousarray(array, dtype)
