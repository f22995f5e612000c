"""Parameters for C: dataclasses that pack themselves into its structs."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .functions import _Layout, _SessionParams
from .values import _i32, _real, _text


@dataclass(frozen=True)
class Layout:
    """How the views of a picture lie in it; see ``pyllava_layout`` in ``csrc/pyllava.h``."""

    grid: tuple[int, int]
    """(columns, rows) of the tiles."""
    size: tuple[int, int]
    """(width, height) of the picture in pixels."""
    flat: bool

    def packed(self) -> _Layout:
        values = zip(("columns", "rows", "width", "height"), (*self.grid, *self.size), strict=True)
        return _Layout(flat=self.flat, **{name: _i32(name, value) for name, value in values})


@dataclass(frozen=True)
class SessionOptions:
    """Parameters of a session, named as in ``csrc/pyllava.h``; in a plan, 0 stands for the default."""

    n_ctx: int
    precision: str
    n_batch: int = 1024
    n_seq: int = 1
    n_threads: int = 0
    n_views: int = 1
    type_k: str | None = None
    type_v: str | None = None
    flash_attn: bool | None = None
    kv_cells: int = 0

    def packed(self) -> _SessionParams:
        numbers = ("n_ctx", "n_batch", "n_seq", "n_threads", "n_views", "kv_cells")
        return _SessionParams(
            type_k=None if self.type_k is None else str(self.type_k).encode(),
            type_v=None if self.type_v is None else str(self.type_v).encode(),
            precision={"exact": 0, "fast": 1}[self.precision],
            flash_attn=-1 if self.flash_attn is None else int(bool(self.flash_attn)),
            **{name: _i32(name, getattr(self, name)) for name in numbers},
        )


@dataclass(frozen=True)
class Placement:
    """Which devices are to hold a model's parts; see ``pyllava_model_params`` in ``csrc/pyllava.h``."""

    device: str = "auto"
    vision_device: str = "auto"
    n_gpu_layers: int = -1
    main_gpu: int = 0
    tensor_split: Sequence[float] | None = None
    kv_on_host: bool = False
    plan_for: SessionOptions | None = None

    def packed(self) -> dict[str, Any]:
        """Fields of ``_ModelParams``. "auto" becomes $PYLLAVA_DEVICE, if that is set."""
        shares = (
            ()
            if self.tensor_split is None
            else tuple(float(_real("tensor_split", share)) for share in self.tensor_split)
        )
        device = os.environ.get("PYLLAVA_DEVICE") or "auto" if self.device == "auto" else self.device
        return {
            "device": _text("device", device),
            "vision_device": _text("vision_device", self.vision_device),
            "n_gpu_layers": _i32("n_gpu_layers", self.n_gpu_layers),
            "main_gpu": _i32("main_gpu", self.main_gpu),
            "tensor_split": (c.c_float * len(shares))(*shares) if shares else None,
            "n_tensor_split": len(shares),
            "kv_on_host": self.kv_on_host,
            "plan_for": None if self.plan_for is None else c.pointer(self.plan_for.packed()),
        }
