"""What ``pyllava-cli bench`` measures."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _lib, models
from ..errors import PyllavaError
from ..images import load_image
from ..views import ImageSpec, preprocess
from .options import device_arguments


class Bench:
    """A model, measured stage by stage; `run` gives the numbers by name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = np.random.RandomState(0)
        self.peak_anon = 0

    def run(self) -> dict[str, Any]:
        options = self.options
        files = models.find(options.model, options.mmproj)
        started = time.perf_counter()
        self.model = _lib.ModelHandle(files.model, files.mmproj, placement=self._placement())
        load = time.perf_counter() - started
        info = self.model.info
        if info.n_ctx_train < options.prompt_tokens + options.predict:
            raise PyllavaError(
                f"{options.prompt_tokens} + {options.predict} tokens, the model was trained for {info.n_ctx_train}: "
                "fewer with -p and -n"
            )
        result: dict[str, Any] = {
            "model": str(files.model),
            "mmproj": None if files.mmproj is None else str(files.mmproj),
            "settings": {
                "prompt_tokens": options.prompt_tokens,
                "predict": options.predict,
                "image_size": list(options.image_size),
                "batch_size": options.batch_size,
                "threads": options.threads,
                "precision": options.precision,
                "repeat": options.repeat,
            },
            "devices": str(self.model.devices),
            "load_s": load,
        }
        image_rows = self._images(result) if info.has_vision else None
        self._text(result, image_rows, load)
        result["peak_anon_bytes"] = self.peak_anon or None
        return result

    def _placement(self) -> _lib.Placement:
        """With room for the largest of the sessions that follow."""
        options = self.options
        wishes = device_arguments(options)
        self.flash_attn = wishes.pop("flash_attn", None)
        wishes["kv_on_host"] = not wishes.pop("kv_offload", True)
        n_ctx = max(options.prompt_tokens + options.predict, (64 + options.predict) * max(options.batch))
        plan = _lib.SessionOptions(
            n_ctx=n_ctx, n_batch=options.batch_size, n_views=0, precision=options.precision,
            flash_attn=self.flash_attn,
        )  # fmt: skip
        return _lib.Placement(plan_for=plan, **wishes)

    def _close(self, session: _lib.SessionHandle) -> None:
        self.peak_anon = max(self.peak_anon, _anon())
        session.close()

    def _session(self, n_ctx: int, n_seq: int = 1, n_views: int = 1) -> _lib.SessionHandle:
        options = self.options
        n_ctx = -(-n_ctx // 256) * 256  # GPUs read whole steps of as many positions
        return _lib.SessionHandle(
            self.model, n_ctx=n_ctx, n_batch=options.batch_size, n_seq=n_seq, n_threads=options.threads,
            n_views=n_views, precision=options.precision, flash_attn=self.flash_attn,
        )  # fmt: skip

    def _median(self, run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(self.options.repeat):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _tokens(self, n: int) -> list[int]:
        n_vocab = self.model.info.n_vocab
        return [int(i) for i in self.random.randint(min(259, n_vocab - 1), n_vocab, n)]

    def _images(self, result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        info, (width, height) = self.model.info, self.options.image_size
        spec = ImageSpec(info.image_size, info.image_mean, info.image_std, info.aspect, info.pinpoints)
        picture = load_image(self.random.randint(0, 256, (height, width, 3)).astype(np.uint8))
        views = preprocess(picture, spec)
        session = self._session(64, n_views=len(views.pixels))
        result["vision_layers_run"] = info.n_layer_vision_run
        result["views"] = len(views.pixels)
        result["encode_s"] = self._median(lambda: session.encode(views.pixels))
        rows = self.model.merge(
            _lib.Layout(views.grid, views.size, flat=info.aspect != "anyres"), session.encode(views.pixels)
        )
        result["image_tokens"] = len(rows)
        self._close(session)
        return rows

    def _text(self, result: dict[str, Any], rows: Any, load: float) -> None:
        n, n_predict = self.options.prompt_tokens, self.options.predict
        around = (32, 16)  # tokens before and after a picture
        with_picture = 0 if rows is None else sum(around) + len(rows)
        session = self._session(max(n + n_predict, with_picture))

        def prefill() -> None:
            session.prefill([_lib.Tokens(self._tokens(n))])

        result["prefill_tok_s"] = n / self._median(prefill)
        times = []
        for token in self._tokens(n_predict):
            started = time.perf_counter()
            session.decode([token], seqs=[0])
            times.append(time.perf_counter() - started)
        result["decode_tok_s"] = 1 / statistics.median(times)
        if rows is not None:
            prompt: list[_lib.Span] = [
                _lib.Tokens(self._tokens(around[0])),
                _lib.Rows(rows, 1),
                _lib.Tokens(self._tokens(around[1])),
            ]
            started = time.perf_counter()
            session.prefill(prompt)
            result["ttft_s"] = load + result["encode_s"] + time.perf_counter() - started
        self._close(session)
        result["decode_batch_tok_s"] = {str(k): self._decode_batch(k) for k in self.options.batch}

    def _decode_batch(self, n_seq: int) -> float:
        """Tokens per second of `n_seq` sequences together, each after its own short prompt."""
        session = self._session(64 + self.options.predict, n_seq=n_seq)
        for seq in range(n_seq):
            session.prefill([_lib.Tokens(self._tokens(32))], seq=seq)
        times = []
        for _ in range(self.options.predict):
            tokens = self._tokens(n_seq)
            started = time.perf_counter()
            session.decode(tokens, seqs=list(range(n_seq)))
            times.append(time.perf_counter() - started)
        self._close(session)
        return n_seq / statistics.median(times)


def _anon() -> int:
    """Resident memory of this process that is no mapped file, in bytes; 0 where unknown."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["RssAnon"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
