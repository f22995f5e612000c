"""pyllava: ask LLaVA models about images, from GGUF files, without PyTorch.

import pyllava

with pyllava.Llava() as m:                       # the small demo model inside the package
    print(m.ask("scene.png", "What is in the picture?"))
"""

from ._engine import Stats
from ._lib import Device, Devices, devices
from ._version import __version__
from .answer import Answer, Stream, Timings, Usage
from .errors import (
    ClosedError,
    ContextOverflowError,
    DeviceError,
    ForkError,
    GenerationCancelled,
    ImageError,
    ModelFileError,
    ModelMemoryError,
    ModelMismatchError,
    NumericError,
    PyllavaError,
    UnsupportedModelError,
)
from .llava import Chat, ImageEmbedding, Llava

__all__ = [
    "Answer",
    "Chat",
    "ClosedError",
    "ContextOverflowError",
    "Device",
    "DeviceError",
    "Devices",
    "ForkError",
    "GenerationCancelled",
    "ImageEmbedding",
    "ImageError",
    "Llava",
    "ModelFileError",
    "ModelMemoryError",
    "ModelMismatchError",
    "NumericError",
    "PyllavaError",
    "Stats",
    "Stream",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "devices",
]
