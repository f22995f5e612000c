"""The binding: the only folder that knows ctypes. ``functions.py`` has a row per function of ``pyllava.h``.

Small handle classes take and return NumPy arrays and Python objects: each owns one C object, checks every
status, and raises the exception that fits, with the library's one-line text. Names with an underscore are
private to the folder.
"""

from .device import Device, Devices, devices, plan_devices
from .functions import FUNCTIONS
from .gguf import GgufHandle, Metadata, TensorInfo
from .handle import Log, Progress
from .load import ABI, engine_version, lib, load_plugins, version
from .model import ModelHandle, ModelInfo
from .params import Layout, Placement, SessionOptions
from .rows import LAST, NOTHING, Ran, Rows, Run, Span, Tokens
from .sampler import SAMPLER_FIELDS, Choice, SamplerHandle
from .session import SessionHandle, Trace
from .tensor_types import TensorType, dequantize, quantize, tensor_type
from .values import FloatArray

__all__ = [
    "ABI",
    "FUNCTIONS",
    "LAST",
    "NOTHING",
    "SAMPLER_FIELDS",
    "Choice",
    "Device",
    "Devices",
    "FloatArray",
    "GgufHandle",
    "Layout",
    "Log",
    "Metadata",
    "ModelHandle",
    "ModelInfo",
    "Placement",
    "Progress",
    "Ran",
    "Rows",
    "Run",
    "SamplerHandle",
    "SessionHandle",
    "SessionOptions",
    "Span",
    "TensorInfo",
    "TensorType",
    "Tokens",
    "Trace",
    "dequantize",
    "devices",
    "engine_version",
    "lib",
    "load_plugins",
    "plan_devices",
    "quantize",
    "tensor_type",
    "version",
]
