"""What ``info`` says of a model in a folder: its files, whether they fit, what they need in memory, how fast they can be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._plain import plain
from .options import PROGRAM

if TYPE_CHECKING:
    from ..models import ModelFiles


def pair_of(name: str) -> ModelFiles | None:
    """The files that -m takes for `name`, without any network; None for a file that is not there, which reading it tells."""
    from .. import models
    from .._aliases import spec_of

    if not os.path.exists(os.path.expanduser(name)) and (spec := spec_of(name)) is not None:
        from .. import hub

        found = hub.cached(spec)
        if found is not None:
            return found
    files = models.find(name, None)
    return files if files.model.exists() else None


def pair_facts(files: ModelFiles, n_ctx: int) -> dict[str, Any]:
    """Loads the model, whose weights are mapped and not read. Raises as that does where its parts do not fit together."""
    from .. import _lib, _memory, _pace, models
    from .._embeddings import most_views, spec_of
    from ..errors import ModelMemoryError

    with models.explained(files):
        model = _lib.ModelHandle(files.model, files.mmproj, placement=_lib.Placement(device="cpu"))
    n_ctx = min(n_ctx, model.info.n_ctx_train)
    n_views = most_views(spec_of(model.info, None))
    memory: dict[str, Any] = {"weights": model.info.size + model.info.size_vision, "free": _memory.free()}
    try:
        session = _lib.SessionHandle(model, n_ctx=n_ctx, n_batch=1024, n_views=n_views, precision="fast")
        kv, text, vision = session.memory()
        memory |= {"kv_cache": kv, "buffers": max(text, vision)}
        memory["all"] = memory["weights"] + kv + max(text, vision)
        session.close()
    except ModelMemoryError as error:
        memory["reason"] = str(error)
    devices = _lib.plan_devices(files.model, files.mmproj)
    told: dict[str, Any] = {
        "model": str(files.model),
        "mmproj": None if files.mmproj is None else str(files.mmproj),
        "has_vision": model.info.has_vision,
        "n_ctx": n_ctx,
        "memory": memory,
        "devices": str(devices),
    }
    model.close()
    n_bytes = _bytes_per_token(files.model)
    if devices.n_gpu_layers == 0 and n_bytes >= _pace.LEAST_BYTES:
        told["speed"] = {"bytes_per_token": n_bytes, "bandwidth": _pace.bandwidth()}
    return told


def _bytes_per_token(model: Path) -> int:
    from .. import _pace
    from .._gguf_names import parts_of
    from ..gguf import GgufFile

    parts = [GgufFile(model.with_name(name)) for name in parts_of(model.name)]
    return _pace.bytes_per_token(tensor for part in parts for tensor in part.tensors)


def pair_report(told: Mapping[str, Any], name: str) -> Iterator[str]:
    from .. import _pace

    yield plain(told["model"])
    if told["mmproj"] is None:
        yield "no projector beside it: it sees no pictures"
    else:
        yield f"{plain(told['mmproj'])}\nthe two fit"
    memory = told["memory"]
    have = f"; {_gib(memory['free'])} are free here" if memory["free"] else ""
    if "reason" in memory:
        yield f"memory does not hold it at a context of {told['n_ctx']}: {memory['reason']}{have}"
    else:
        yield (
            f"needs {_gib(memory['all'])} of memory at a context of {told['n_ctx']}: weights {_gib(memory['weights'])}, "
            f"KV cache {_gib(memory['kv_cache'])}, buffers {_gib(memory['buffers'])}{have}"
        )
        if 0 < memory["free"] < memory["all"]:
            yield "that is more than there is: parts of it would be read again and again, or it is refused"
    yield f"on this machine: {told['devices']}"
    speed = told.get("speed")
    if speed is None:
        yield f"how fast it is here, `{PROGRAM} bench -m {plain(name)}` measures"
        return
    rate = speed["bandwidth"] / speed["bytes_per_token"]
    yield (
        f"up to about {_pace.about(rate)} tokens/s: each reads {_gib(speed['bytes_per_token'])} of weights, and memory gave "
        f"{_gib(speed['bandwidth'])}/s just now; `{PROGRAM} bench -m {plain(name)}` measures it"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"
