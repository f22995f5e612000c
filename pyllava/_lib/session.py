"""A session of a model: its steps, its sequences."""

from __future__ import annotations

import contextlib
import ctypes as c
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import errors
from .functions import _I32, _P, _TRACE_FN, _Run, _SessionPlan, _Span
from .handle import Progress, _Callback, _Handle, _sessions
from .load import _check, lib
from .model import ModelHandle
from .params import SessionOptions
from .rows import Ran, Run, Span, Tokens
from .sampler import Choice, _Asked
from .values import FloatArray, _i32, _pointer

Trace: TypeAlias = Callable[[str, FloatArray], None]


class SessionHandle:
    """KV cache, threads and compute buffers. One thread at a time, but for cancel()."""

    def __init__(self, model: ModelHandle, **options: Any) -> None:
        self._model, address = model, _P()
        params = SessionOptions(**options).packed()
        with model.handle.use() as at:
            _check(lib.pyllava_session_create(at, c.byref(params), c.byref(address)))
            self._handle = _Handle("pyllava_session_free", address.value, model.handle)
        self._callback = _Callback()
        self._progress_fn: Any = None
        _sessions.add(self)

    @property
    def handle(self) -> _Handle:
        return self._handle

    def close(self) -> None:
        self._handle.close()

    def memory(self) -> tuple[int, int, int]:
        """Bytes of KV cache, compute buffer for text, compute buffer for images (the larger one is taken)."""
        plan = _SessionPlan()
        with self._handle.use() as at:
            _check(lib.pyllava_session_memory(at, c.byref(plan)))
        return plan.kv_size, plan.compute_size, plan.compute_size_vision

    def cancel(self, on: bool = True) -> None:
        """Ends the running call, or the next one, with GenerationCancelled; from any thread."""
        with contextlib.suppress(errors.ClosedError), self._handle.use() as at:
            lib.pyllava_session_cancel(at, on)

    def cancel_at_exit(self) -> None:
        """cancel() that also keeps further calls out."""
        held = self._handle._object
        if held is not None:
            lib.pyllava_session_cancel(held.address, True)

    def set_progress(self, fn: Progress | None) -> None:
        self._progress_fn = self._callback.progress(fn)
        with self._handle.use() as at:
            lib.pyllava_session_progress(at, self._progress_fn, None)

    def _finish(self, status: int) -> None:
        error, self._callback.error = self._callback.error, None
        if error is not None:
            raise error
        _check(status)

    def encode(self, pixels: FloatArray) -> FloatArray:
        """Views float32 [n_views, 3, S, S] to embeddings float32 [n_views, n_image_tokens, n_embd]."""
        info = self._model.info
        pixels = np.ascontiguousarray(pixels, np.float32)
        shape = (3, info.image_size, info.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != shape:
            raise ValueError(f"pixels: shape {pixels.shape}, need (n_views, {', '.join(map(str, shape))})")
        out = np.empty((len(pixels), info.n_image_tokens, info.n_embd), np.float32)
        with self._handle.use() as at:
            self._finish(lib.pyllava_encode(at, _pointer(pixels), len(pixels), _pointer(out)))
        return out

    def _spans(self, parts: Sequence[Span]) -> tuple[Any, list[npt.NDArray[Any]]]:
        spans, keep = (_Span * max(len(parts), 1))(), []
        for span, part in zip(spans, parts, strict=False):
            span.n = len(part)
            if isinstance(part, Tokens):
                keep.append(np.array(part.ids, np.int32))
                span.tokens = _pointer(keep[-1])
                continue
            keep.append(np.ascontiguousarray(part.embd, np.float32))
            if keep[-1].ndim != 2 or keep[-1].shape[1] != self._model.info.n_embd:
                raise ValueError(f"embeddings: shape {keep[-1].shape}, need (n, {self._model.info.n_embd})")
            span.embd, span.key = _pointer(keep[-1]), part.key
        return spans, keep

    def _packed(
        self, runs: Sequence[Run], used: contextlib.ExitStack, n_steps: int = 1
    ) -> tuple[Any, list[FloatArray], list[_Asked | None], list[object]]:
        """Runs for C, arrays for their logits and choices, and objects to keep until they are computed."""
        packed, found = (_Run * max(len(runs), 1))(), []
        asked: list[_Asked | None] = []
        keep: list[object] = []
        for target, run in zip(packed, runs, strict=False):
            spans, arrays = self._spans(run.parts)
            logits = np.empty((run.n_rows, self._model.info.n_vocab), np.float32)
            keep.append((spans, arrays))
            found.append(logits)
            target.seq, target.append, target.kind = _i32("seq", run.seq), run.append, int(run.answer)
            target.spans, target.n_spans = spans, len(run.parts)
            target.first = _i32("first", run.first)
            target.logits = _pointer(logits) if logits.size else None
            if run.sampler is None and (run.mask is not None or run.n_alternatives):
                raise ValueError("mask and n_alternatives: need a sampler")
            asked.append(None)
            if run.sampler is not None:
                target.sampler = used.enter_context(run.sampler.handle.use())
                asked[-1] = run.sampler.ask(target, run.mask, run.n_alternatives, n_steps)
        return packed, found, asked, keep

    def step(self, runs: Sequence[Run]) -> list[Ran]:
        """Computes all runs, each of another sequence, or none."""
        with contextlib.ExitStack() as used:
            at = used.enter_context(self._handle.use())
            packed, found, asked, keep = self._packed(runs, used)
            status = lib.pyllava_step(at, packed, len(runs))
        del keep
        self._finish(status)
        return [
            Ran(logits, run.n_reused, choices.choice(0) if choices else None)
            for logits, run, choices in zip(found, packed, asked, strict=False)
        ]

    def generate(self, runs: Sequence[Run], n_steps: int, seconds: float = 3600.0) -> list[list[Choice]]:
        """Up to `n_steps` steps of answers in one call: each run's choices, which its next steps append.

        The runs append rows of answers and have samplers. Ends early after a token that ends an answer, or
        after `seconds`.
        """
        n = _I32()
        with contextlib.ExitStack() as used:
            at = used.enter_context(self._handle.use())
            packed, _, asked, keep = self._packed(runs, used, max(1, n_steps))
            status = lib.pyllava_generate(
                at, packed, len(runs), _i32("n_steps", n_steps), seconds, c.byref(n)
            )
        del keep
        self._finish(status)
        return [[choices.choice(i) for i in range(n.value)] for choices in asked if choices]

    def prefill(self, parts: Sequence[Span], *, seq: int = 0) -> tuple[FloatArray, int]:
        """Makes sequence `seq` hold `parts`: the last row's logits float32 [n_vocab], and the rows reused."""
        spans, keep = self._spans(parts)
        out, n_reused = np.empty(self._model.info.n_vocab, np.float32), _I32()
        with self._handle.use() as at:
            status = lib.pyllava_prefill(
                at, _i32("seq", seq), spans, len(parts), _pointer(out), c.byref(n_reused)
            )
        del keep
        self._finish(status)
        return out, n_reused.value

    def logits(self, parts: Sequence[Span], *, seq: int = 0) -> FloatArray:
        """Logits of every row of `parts`: float32 [n, n_vocab]."""
        spans, keep = self._spans(parts)
        out = np.empty((sum(map(len, parts)), self._model.info.n_vocab), np.float32)
        with self._handle.use() as at:
            status = lib.pyllava_logits(at, _i32("seq", seq), spans, len(parts), _pointer(out))
        del keep
        self._finish(status)
        return out

    def decode(self, ids: Sequence[int], *, seqs: Sequence[int] | None = None) -> FloatArray:
        """Appends ids[i] to sequence seqs[i] (default 0, 1, ...): logits float32 [n, n_vocab]."""
        tokens = np.array(ids, np.int32)
        where = np.arange(len(tokens), dtype=np.int32) if seqs is None else np.array(seqs, np.int32)
        if len(where) != len(tokens):
            raise ValueError(f"{len(tokens)} ids for {len(where)} sequences")
        out = np.empty((len(tokens), self._model.info.n_vocab), np.float32)
        with self._handle.use() as at:
            self._finish(
                lib.pyllava_decode(at, _pointer(where), _pointer(tokens), len(tokens), _pointer(out))
            )
        return out

    def seq_length(self, seq: int = 0) -> int:
        n = _I32()
        with self._handle.use() as at:
            _check(lib.pyllava_seq_length(at, _i32("seq", seq), c.byref(n)))
        return n.value

    def seq_shared(self, seqs: Iterable[int], runs: Sequence[Run]) -> list[int]:
        """How many rows of these runs, one after the other, each sequence begins with (by content and kind)."""
        n, packed = _I32(), (_Run * max(len(runs), 1))()
        keep = []
        for target, run in zip(packed, runs, strict=False):
            keep.append(self._spans(run.parts))
            target.kind, target.spans, target.n_spans = int(run.answer), keep[-1][0], len(run.parts)
        found = []
        with self._handle.use() as at:
            for seq in seqs:
                _check(lib.pyllava_seq_shared(at, _i32("seq", seq), packed, len(runs), c.byref(n)))
                found.append(n.value)
        return found

    def cells_free(self, without: Sequence[int] = ()) -> int:
        """Cells of the KV cache that would be free if the sequences `without` held nothing."""
        n, seqs = _I32(), np.array(without, np.int32)
        with self._handle.use() as at:
            _check(lib.pyllava_cells_free(at, _pointer(seqs), len(seqs), c.byref(n)))
        return n.value

    def seq_trim(self, seq: int, n: int) -> None:
        """Keeps the first `n` positions of a sequence."""
        with self._handle.use() as at:
            _check(lib.pyllava_seq_trim(at, _i32("seq", seq), _i32("n", n)))

    def seq_copy(self, source: int, target: int, n: int) -> None:
        """Makes `target` the first `n` positions of `source`, sharing their cells."""
        with self._handle.use() as at:
            _check(lib.pyllava_seq_copy(at, _i32("source", source), _i32("target", target), _i32("n", n)))

    def trace(self, run: Callable[[], object], fn: Trace) -> None:
        """Calls `fn(name, array)` for every named intermediate computed while `run()` runs."""
        failed: list[BaseException] = []

        def call(name: bytes, data: Any, shape: Any, n_dims: int, _user: object) -> None:
            try:
                array = np.ctypeslib.as_array(data, tuple(shape[:n_dims])).copy()
                fn(name.decode(), array)
            except BaseException as error:
                failed.append(error)

        callback = _TRACE_FN(call)
        with self._handle.use() as at:
            lib.pyllava_session_trace(at, callback, None)
            try:
                run()
            finally:
                lib.pyllava_session_trace(at, _TRACE_FN(), None)
        if failed:
            raise failed[0]
