"""Sampling: from logits to a token."""

from __future__ import annotations

import ctypes as c
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .functions import _I32, _NEUTRAL, _P, _U64, _Choice, _Run, _SamplerParams
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
SAMPLER_FIELDS: tuple[str, ...] = tuple(_KINDS)


def _number(name: str, value: Any) -> float:
    """A field of ``pyllava_sampler_params``; a seed is cut to 64 bits."""
    if _KINDS[name] is _U64:
        return operator.index(value) & (2**64 - 1)
    return _i32(name, value) if _KINDS[name] is _I32 else _real(name, value)


class SamplerHandle:
    """Random state and the recent tokens of one answer, for the vocabulary of one model."""

    def __init__(self, model: ModelHandle, **numbers: float) -> None:
        """`numbers`: fields of ``pyllava_sampler_params`` (SAMPLER_FIELDS); a missing one changes nothing."""
        if wrong := numbers.keys() - set(SAMPLER_FIELDS):
            raise TypeError(f"no number of a sampler: {', '.join(sorted(wrong))}")
        given = {name: _number(name, value) for name, value in (_NEUTRAL | numbers).items()}
        params = _SamplerParams(**given)
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
