"""The devices of this machine, and which of them hold the parts of a model."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass

from .. import errors
from .functions import _Device, _ModelDevices, _ModelParams
from .load import _check, device_count, lib, load_plugins
from .params import Placement
from .values import _path


@dataclass(frozen=True)
class Device:
    """A device that this build can compute on."""

    name: str
    """What the parameter `device` names: "CPU", "CUDA0", "Vulkan1"."""
    description: str
    backend: str
    kind: str
    """"cpu", "gpu" (memory of its own), "integrated" (shares the machine's memory), or "other" (not used)."""
    memory_free: int
    """Bytes; 0 where unknown."""
    memory_total: int


def devices() -> list[Device]:
    """All devices that this build finds on this machine."""
    load_plugins()
    found = []
    for i in range(device_count()):
        d = _Device()
        _check(lib.pyllava_device_describe(i, c.byref(d)))
        texts = (d.name.decode(), d.description.decode(errors="replace"), d.backend.decode())
        kind = ("cpu", "gpu", "integrated", "other")[d.kind]
        found.append(Device(*texts, kind, d.memory_free, d.memory_total))
    return found


@dataclass(frozen=True)
class Devices:
    """Which device computes each part of a model: names as in `devices()`, "CPU" among them."""

    layers: tuple[str, ...]
    """Of the language model's layers, from the first to the last."""
    output: str
    vision: str | None
    """Tower and projector; None for a text-only model."""
    kv_on_host: bool
    """True: the KV cache lies in host memory, even that of layers on a GPU."""
    n_gpu_layers: int
    """As the parameter of that name counts: layers that are not on the CPU, and the output."""

    def __str__(self) -> str:
        parts: list[str] = []
        first = 0
        for last, name in enumerate(self.layers):
            if last + 1 == len(self.layers) or self.layers[last + 1] != name:
                parts.append(f"layers {first}-{last}: {name}")
                first = last + 1
        parts.append(f"output: {self.output}")
        parts += [f"vision: {self.vision}"] if self.vision else []
        return ", ".join(parts)


def _devices(found: _ModelDevices) -> Devices:
    return Devices(
        layers=tuple(name.decode() for name in found.layers[: found.n_layer]),
        output=found.output.decode(),
        vision=found.vision.decode() if found.vision else None,
        kv_on_host=found.kv_on_host,
        n_gpu_layers=found.n_gpu_layers,
    )


def plan_devices(
    path: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None, placement: Placement | None = None
) -> Devices:
    """Where a model's parts would go, without loading it."""
    load_plugins()
    params = _ModelParams(
        path=_path(path),
        mmproj=None if mmproj is None else _path(mmproj),
        use_mmap=True,
        **(placement or Placement()).packed(),
    )
    found = _ModelDevices()
    _check(lib.pyllava_model_plan(c.byref(params), c.byref(found)))
    return _devices(found)


def _refuse_devices_after_fork(placement: Placement) -> None:
    """Raises ForkError if a device was used before fork(): in the child, back ends hang or abort."""
    wants = not (placement.device == "cpu" and placement.vision_device in ("auto", "cpu"))
    if wants and any(pid != os.getpid() for pid in _device_users):
        raise errors.ForkError(
            'devices were used before fork(): start processes with "spawn", or load with device="cpu"'
        )


_device_users: set[int] = set()
