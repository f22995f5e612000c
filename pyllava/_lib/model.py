"""A loaded model: its numbers, its devices, its vocabulary."""

from __future__ import annotations

import ctypes as c
import itertools
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from .._leaving import leavable
from .device import _device_users, _devices, _refuse_devices_after_fork
from .functions import _I32, _P, _U64, _ModelDevices, _ModelInfo, _ModelParams, _Range
from .gguf import Metadata
from .handle import Log, Progress, _Callback, _Handle
from .load import _check, lib, load_plugins
from .params import Layout, Placement
from .values import FloatArray, _i32, _path, _pointer

_LONG_TEXT = 1 << 18  # bytes that are tokenized in a tenth of a second
Aspect: TypeAlias = Literal["pad", "squash", "anyres"]
_ASPECTS: tuple[Aspect, ...] = ("pad", "squash", "anyres")  # pyllava_aspect, by number


@dataclass(frozen=True)
class ModelInfo:
    """The numbers of a loaded model, named as in ``pyllava.h``; image fields are 0 without a projector."""

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx_train: int
    bos_id: int
    eos_id: int
    unk_id: int
    add_bos: bool
    space_prefix: bool
    nfc: bool
    has_vision: bool
    image_size: int
    patch_size: int
    n_image_tokens: int
    n_embd_vision: int
    n_layer_vision: int
    n_layer_vision_run: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    aspect: Aspect
    """How a picture becomes views; see `pyllava.views`."""
    anyres_max: int
    """Of LLaVA-OneVision: a grid of tiles with clearly more rows than so many views is reduced; else 0."""
    pinpoints: tuple[tuple[int, int], ...]
    size: int
    size_vision: int


class ModelHandle:
    """Weights, vocabulary and hyper-parameters of a language model and, optionally, a projector."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None,
        *,
        use_mmap: bool = True,
        placement: Placement | None = None,
        progress: Progress | None = None,
        log: Log | None = None,
    ) -> None:
        load_plugins()
        callback, address = _Callback(), _P()
        placement = placement or Placement()
        _refuse_devices_after_fork(placement)
        params = _ModelParams(
            path=_path(path),
            mmproj=None if mmproj is None else _path(mmproj),
            use_mmap=use_mmap,
            **placement.packed(),
            progress=callback.progress(progress),
            log=callback.log(log),
        )
        status = lib.pyllava_model_load(c.byref(params), c.byref(address))
        if status == 0:
            self._handle = _Handle("pyllava_model_free", address.value)
        callback.raise_error()
        _check(status)
        info = _ModelInfo()
        with self._handle.use() as at:
            _check(lib.pyllava_model_describe(at, c.byref(info)))
        values = {name: getattr(info, name) for name, *_ in info._fields_}
        values |= {"image_mean": tuple(info.image_mean), "image_std": tuple(info.image_std)}
        values["pinpoints"] = tuple((width, height) for width, height in info.pinpoints[: info.n_pinpoints])
        del values["n_pinpoints"]
        values["aspect"] = _ASPECTS[info.aspect]
        self.info = ModelInfo(**values)
        found = _ModelDevices()
        with self._handle.use() as at:
            _check(lib.pyllava_model_placement(at, c.byref(found)))
        self.devices = _devices(found)
        if {*self.devices.layers, self.devices.output, self.devices.vision} - {"CPU", None}:
            _device_users.add(os.getpid())

    @property
    def handle(self) -> _Handle:
        return self._handle

    def close(self) -> None:
        self._handle.close()

    def merge_length(self, layout: Layout) -> int:
        """How many rows a picture becomes for the language model."""
        n = _I32()
        with self._handle.use() as at:
            _check(lib.pyllava_merge_length(at, c.byref(layout.packed()), c.byref(n)))
        return n.value

    def merge(self, layout: Layout, views: FloatArray) -> FloatArray:
        """Embeddings of a picture's views float32 [n_views, n_image_tokens, n_embd] to rows [n, n_embd]."""
        info, (columns, rows) = self.info, layout.grid
        views = np.ascontiguousarray(views, np.float32)
        shape = (1 + columns * rows, info.n_image_tokens, info.n_embd)
        if views.shape != shape:
            raise ValueError(f"views: shape {views.shape}, need {shape}")
        out = np.empty((self.merge_length(layout), info.n_embd), np.float32)
        with self._handle.use() as at:
            _check(lib.pyllava_merge(at, c.byref(layout.packed()), _pointer(views), _pointer(out)))
        return out

    def metadata(self) -> Metadata:
        return Metadata(self._handle, lib.pyllava_model_file)

    def mmproj_metadata(self) -> Metadata:
        """Without keys where there is no projector."""
        return Metadata(self._handle, lib.pyllava_model_mmproj)

    def tokenize(
        self, text: str, *, plain: Sequence[tuple[int, int]] = (), add_bos: bool = False
    ) -> list[int]:
        """Token ids; special tokens are recognised except in the byte ranges `plain`."""
        encoded = text.encode()
        if self.info.nfc and not unicodedata.is_normalized("NFC", text):
            encoded, plain = _composed(encoded, plain)
        if len(encoded) < _LONG_TEXT:
            return self._encode(encoded, plain, add_bos)
        return leavable(lambda: self._encode(encoded, plain, add_bos))

    def _encode(self, text: bytes, plain: Sequence[tuple[int, int]], add_bos: bool) -> list[int]:
        ranges = (_Range * len(plain))(*(_Range(*r) for r in plain)) if plain else None
        n, room = _U64(), len(text) + 2
        while True:
            ids = np.empty(room, np.int32)
            out = (_pointer(ids), room, c.byref(n))
            with self._handle.use() as at:
                status = lib.pyllava_tokenize(at, text, len(text), ranges, len(plain), add_bos, *out)
            if status == 0 or n.value <= room:
                _check(status)
                found: list[int] = ids[: n.value].tolist()
                return found
            room = n.value

    def piece(self, token: int, *, with_special: bool = False) -> bytes:
        """The bytes of one token as they stand in an answer; may end within a character."""
        text, size = _P(), _U64()
        with self._handle.use() as at:
            status = lib.pyllava_token_piece(
                at, _i32("token", token), with_special, c.byref(text), c.byref(size)
            )
            _check(status)
            return c.string_at(text.value or 0, size.value) if size.value else b""

    def pieces(self) -> list[bytes]:
        """piece() of every token."""
        text, size, found = _P(), _U64(), []
        with self._handle.use() as at:
            for token in range(self.info.n_vocab):
                _check(lib.pyllava_token_piece(at, token, False, c.byref(text), c.byref(size)))
                found.append(c.string_at(text.value or 0, size.value) if size.value else b"")
        return found

    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        with self._handle.use() as at:
            return [token for token in range(self.info.n_vocab) if lib.pyllava_token_is_end(at, token)]

    def is_end(self, token: int) -> bool:
        """True if the token ends an answer."""
        with self._handle.use() as at:
            return bool(lib.pyllava_token_is_end(at, token))


def _composed(text: bytes, plain: Sequence[tuple[int, int]]) -> tuple[bytes, list[tuple[int, int]]]:
    """A text in normalisation form C, and the ranges in it that were `plain`.

    What stands between the ends of ranges is composed by itself: a user's combining marks change no template.
    """
    ends = sorted({0, len(text), *(min(end, len(text)) for r in plain for end in r)})
    moved, composed = {0: 0}, b""
    for begin, end in itertools.pairwise(ends):
        part = text[begin:end].decode(errors="surrogateescape")  # a range may end within a character
        composed += unicodedata.normalize("NFC", part).encode(errors="surrogateescape")
        moved[end] = len(composed)
    return composed, [(moved[min(a, len(text))], moved[min(b, len(text))]) for a, b in plain]
