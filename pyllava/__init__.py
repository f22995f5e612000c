"""pyllava: ask LLaVA models about images, from GGUF files, without PyTorch.

import pyllava

with pyllava.Llava() as m:                       # the small demo model inside the package
    print(m.ask("scene.png", "What is in the picture?"))

The names are resolved when they are first used: the import alone loads neither the compiled library nor
NumPy, so that the converters and ``pyllava-cli --help`` need neither.
"""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from ._embeddings import ImageEmbedding, Images
    from ._explain import Cost
    from ._lib import Device, Devices, ModelInfo, devices
    from ._scheduler import Stats
    from ._scorer import Loglikelihood, Scores
    from .aio import AsyncChat, AsyncLlava, AsyncStream
    from .answer import Answer, Stream, Timings, TokenLogprob, Usage
    from .batch import Result
    from .chat import Chat
    from .errors import (
        ClosedError,
        ContextOverflowError,
        DeviceError,
        ForkError,
        GenerationCancelled,
        HubError,
        ImageError,
        ModelFileError,
        ModelMemoryError,
        ModelMismatchError,
        NumericError,
        PyllavaError,
        UnsupportedModelError,
    )
    from .heat_map import HeatMap
    from .llava import Llava
    from .sampling import Options, Sampling
    from .templates import Message, Template
    from .view import ImageView

__all__ = [
    "Answer",
    "AsyncChat",
    "AsyncLlava",
    "AsyncStream",
    "Chat",
    "ClosedError",
    "ContextOverflowError",
    "Cost",
    "Device",
    "DeviceError",
    "Devices",
    "ForkError",
    "GenerationCancelled",
    "HeatMap",
    "HubError",
    "ImageEmbedding",
    "ImageError",
    "ImageView",
    "Images",
    "Llava",
    "Loglikelihood",
    "Message",
    "ModelFileError",
    "ModelInfo",
    "ModelMemoryError",
    "ModelMismatchError",
    "NumericError",
    "Options",
    "PyllavaError",
    "Result",
    "Sampling",
    "Scores",
    "Stats",
    "Stream",
    "Template",
    "Timings",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "devices",
]

_ELSEWHERE = {
    **dict.fromkeys(("Device", "Devices", "ModelInfo", "devices"), "_lib"),
    "Result": "batch",
    **dict.fromkeys(("Answer", "Stream", "Timings", "TokenLogprob", "Usage"), "answer"),
    "Stats": "_scheduler",
    **dict.fromkeys(("AsyncChat", "AsyncLlava", "AsyncStream"), "aio"),
    **dict.fromkeys(("ImageEmbedding", "Images"), "_embeddings"),
    **dict.fromkeys(("Options", "Sampling"), "sampling"),
    **dict.fromkeys(("Message", "Template"), "templates"),
    "Chat": "chat",
    "ImageView": "view",
    "Llava": "llava",
    **dict.fromkeys(("Loglikelihood", "Scores"), "_scorer"),
    "Cost": "_explain",
    "HeatMap": "heat_map",
}  # every other name of __all__ is an exception
_MODULES = (
    "aio",
    "answer",
    "batch",
    "chat",
    "compat",
    "errors",
    "gguf",
    "heat_map",
    "hub",
    "images",
    "llava",
    "models",
    "ray",
    "sampling",
    "templates",
    "types",
    "view",
    "views",
)

if not TYPE_CHECKING:  # a type checker would take any name for one of the module's

    def __getattr__(name: str) -> object:
        """A public name or module, when it is first asked for. Raises ImportError without the library."""
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}")
        globals()[name] = value = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
