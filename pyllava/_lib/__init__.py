"""The binding: the only module that knows ctypes. One row per function of ``csrc/pyllava.h``, in its order.

Above it stand small handle classes that speak numpy and Python: each owns one C object, checks every status, and
raises the exception that fits, with the library's one-line text.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes as c
import errno
import functools
import importlib.metadata
import logging
import operator
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import _plugins, errors

ABI = 5
FloatArray: TypeAlias = npt.NDArray[np.float32]
Progress: TypeAlias = Callable[[str, float], object]
Trace: TypeAlias = Callable[[str, FloatArray], None]
Log: TypeAlias = Callable[[int, str], None]

_MAX_LAYERS = 512
_TEXT, _P, _U64, _I32, _BOOL = c.c_char_p, c.c_void_p, c.c_uint64, c.c_int32, c.c_bool
_PROGRESS_FN = c.CFUNCTYPE(c.c_bool, c.c_char_p, c.c_float, c.c_void_p)
_LOG_FN = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_TRACE_FN = c.CFUNCTYPE(None, c.c_char_p, c.POINTER(c.c_float), c.POINTER(c.c_int64), c.c_int, c.c_void_p)


class _Kv(c.Structure):
    _fields_ = [
        ("key", _TEXT),
        ("type", _I32),
        ("item_type", _I32),
        ("n", _U64),
        ("data", _P),
    ]


class _TensorInfo(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("type", _TEXT),
        ("n_dims", _I32),
        ("shape", c.c_int64 * 4),
        ("offset", _U64),
        ("size", _U64),
    ]


class _TensorType(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("id", _I32),
        ("block", c.c_int64),
        ("block_size", _U64),
        ("can_quantize", _BOOL),
        ("can_dequantize", _BOOL),
    ]


class _Rows(c.Structure):
    _fields_ = [
        ("type", _TEXT),
        ("n", c.c_int64),
        ("n_per_row", c.c_int64),
        ("first", c.c_int64),
        ("size", _U64),
    ]


class _Device(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("description", _TEXT),
        ("backend", _TEXT),
        ("kind", _I32),
        ("memory_free", _U64),
        ("memory_total", _U64),
    ]


class _SessionParams(c.Structure):
    _fields_ = [
        ("n_ctx", _I32),
        ("n_batch", _I32),
        ("n_seq", _I32),
        ("n_threads", _I32),
        ("n_views", _I32),
        ("type_k", _TEXT),
        ("type_v", _TEXT),
        ("precision", c.c_int),
        ("flash_attn", _I32),
        ("kv_cells", _I32),
    ]


class _ModelParams(c.Structure):
    _fields_ = [
        ("path", _TEXT),
        ("mmproj", _TEXT),
        ("use_mmap", _BOOL),
        ("device", _TEXT),
        ("vision_device", _TEXT),
        ("n_gpu_layers", _I32),
        ("main_gpu", _I32),
        ("tensor_split", c.POINTER(c.c_float)),
        ("n_tensor_split", _I32),
        ("kv_on_host", _BOOL),
        ("plan_for", c.POINTER(_SessionParams)),
        ("progress", _PROGRESS_FN),
        ("log", _LOG_FN),
        ("user", _P),
    ]


class _ModelDevices(c.Structure):
    _fields_ = [
        ("n_layer", _I32),
        ("layers", _TEXT * _MAX_LAYERS),
        ("output", _TEXT),
        ("vision", _TEXT),
        ("kv_on_host", _BOOL),
        ("n_gpu_layers", _I32),
    ]


class _ModelInfo(c.Structure):
    _fields_ = [
        ("n_vocab", _I32),
        ("n_embd", _I32),
        ("n_layer", _I32),
        ("n_head", _I32),
        ("n_head_kv", _I32),
        ("head_dim", _I32),
        ("n_ff", _I32),
        ("n_ctx_train", _I32),
        ("bos_id", _I32),
        ("eos_id", _I32),
        ("unk_id", _I32),
        ("add_bos", _BOOL),
        ("has_vision", _BOOL),
        ("image_size", _I32),
        ("patch_size", _I32),
        ("n_image_tokens", _I32),
        ("n_embd_vision", _I32),
        ("n_layer_vision", _I32),
        ("n_layer_vision_run", _I32),
        ("image_mean", c.c_float * 3),
        ("image_std", c.c_float * 3),
        ("anyres", _BOOL),
        ("n_pinpoints", _I32),
        ("pinpoints", _I32 * 2 * 64),
        ("size", _U64),
        ("size_vision", _U64),
    ]


class _Range(c.Structure):
    _fields_ = [("begin", _U64), ("end", _U64)]


class _SessionPlan(c.Structure):
    _fields_ = [("kv_size", _U64), ("compute_size", _U64), ("compute_size_vision", _U64)]


class _Layout(c.Structure):
    _fields_ = [("columns", _I32), ("rows", _I32), ("width", _I32), ("height", _I32), ("flat", _BOOL)]


class _Span(c.Structure):
    _fields_ = [("tokens", _P), ("embd", _P), ("key", _U64), ("n", _I32)]


class _Choice(c.Structure):
    _fields_ = [("id", _I32), ("log_prob", c.c_float)]


class _Run(c.Structure):
    _fields_ = [
        ("seq", _I32),
        ("append", _BOOL),
        ("kind", c.c_int),
        ("spans", c.POINTER(_Span)),
        ("n_spans", _I32),
        ("first", _I32),
        ("logits", _P),
        ("n_reused", _I32),
        ("sampler", _P),
        ("mask", _P),
        ("n_alternatives", _I32),
        ("choice", c.POINTER(_Choice)),
        ("alternatives", c.POINTER(_Choice)),
    ]


class _SamplerParams(c.Structure):
    _fields_ = [
        ("temperature", c.c_float),
        ("top_k", _I32),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
        ("repeat_penalty", c.c_float),
        ("repeat_last_n", _I32),
        ("seed", _U64),
    ]


_STATUS = c.c_int  # functions that return pyllava_status

# name: (result, arguments), in the order of the header
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "pyllava_abi": (c.c_int, []),
    "pyllava_version": (_TEXT, []),
    "pyllava_engine_version": (_TEXT, []),
    "pyllava_last_error": (_TEXT, []),
    "pyllava_plugin_load": (_STATUS, [c.POINTER(_TEXT), _I32]),
    "pyllava_gguf_open": (_STATUS, [_TEXT, c.POINTER(_P)]),
    "pyllava_gguf_free": (None, [_P]),
    "pyllava_gguf_version": (c.c_uint32, [_P]),
    "pyllava_gguf_alignment": (c.c_uint32, [_P]),
    "pyllava_gguf_n_kv": (_U64, [_P]),
    "pyllava_gguf_n_tensors": (_U64, [_P]),
    "pyllava_gguf_kv": (_STATUS, [_P, _U64, c.POINTER(_Kv)]),
    "pyllava_gguf_string": (_STATUS, [_P, _U64, _U64, c.POINTER(_P), c.POINTER(_U64)]),
    "pyllava_gguf_tensor": (_STATUS, [_P, _U64, c.POINTER(_TensorInfo)]),
    "pyllava_gguf_record": (_STATUS, [_P, _U64, c.POINTER(_U64), c.POINTER(_U64)]),
    "pyllava_device_count": (_I32, []),
    "pyllava_device_describe": (_STATUS, [_I32, c.POINTER(_Device)]),
    "pyllava_tensor_type_find": (_STATUS, [_TEXT, c.POINTER(_TensorType)]),
    "pyllava_quantize": (_STATUS, [c.POINTER(_Rows), _P, _P]),
    "pyllava_dequantize": (_STATUS, [c.POINTER(_Rows), _P, _P]),
    "pyllava_model_load": (_STATUS, [c.POINTER(_ModelParams), c.POINTER(_P)]),
    "pyllava_model_free": (None, [_P]),
    "pyllava_model_plan": (_STATUS, [c.POINTER(_ModelParams), c.POINTER(_ModelDevices)]),
    "pyllava_model_describe": (_STATUS, [_P, c.POINTER(_ModelInfo)]),
    "pyllava_model_placement": (_STATUS, [_P, c.POINTER(_ModelDevices)]),
    "pyllava_model_file": (_P, [_P]),
    "pyllava_model_mmproj": (_P, [_P]),
    "pyllava_tokenize": (_STATUS, [_P, _TEXT, _U64, _P, _U64, _BOOL, _P, _U64, c.POINTER(_U64)]),
    "pyllava_token_piece": (_STATUS, [_P, _I32, _BOOL, c.POINTER(_P), c.POINTER(_U64)]),
    "pyllava_token_is_end": (_BOOL, [_P, _I32]),
    "pyllava_session_create": (_STATUS, [_P, c.POINTER(_SessionParams), c.POINTER(_P)]),
    "pyllava_session_free": (None, [_P]),
    "pyllava_session_memory": (_STATUS, [_P, c.POINTER(_SessionPlan)]),
    "pyllava_session_cancel": (None, [_P, _BOOL]),
    "pyllava_session_trace": (None, [_P, _TRACE_FN, _P]),
    "pyllava_session_progress": (None, [_P, _PROGRESS_FN, _P]),
    "pyllava_encode": (_STATUS, [_P, _P, _I32, _P]),
    "pyllava_merge_length": (_STATUS, [_P, c.POINTER(_Layout), c.POINTER(_I32)]),
    "pyllava_merge": (_STATUS, [_P, c.POINTER(_Layout), _P, _P]),
    "pyllava_step": (_STATUS, [_P, c.POINTER(_Run), _I32]),
    "pyllava_generate": (_STATUS, [_P, c.POINTER(_Run), _I32, _I32, c.c_double, c.POINTER(_I32)]),
    "pyllava_prefill": (_STATUS, [_P, _I32, c.POINTER(_Span), _I32, _P, c.POINTER(_I32)]),
    "pyllava_logits": (_STATUS, [_P, _I32, c.POINTER(_Span), _I32, _P]),
    "pyllava_decode": (_STATUS, [_P, _P, _P, _I32, _P]),
    "pyllava_seq_length": (_STATUS, [_P, _I32, c.POINTER(_I32)]),
    "pyllava_seq_shared": (_STATUS, [_P, _I32, c.POINTER(_Run), _I32, c.POINTER(_I32)]),
    "pyllava_cells_free": (_STATUS, [_P, _P, _I32, c.POINTER(_I32)]),
    "pyllava_seq_trim": (_STATUS, [_P, _I32, _I32]),
    "pyllava_seq_copy": (_STATUS, [_P, _I32, _I32, _I32]),
    "pyllava_sampler_create": (_STATUS, [_P, c.POINTER(_SamplerParams), c.POINTER(_P)]),
    "pyllava_sampler_free": (None, [_P]),
    "pyllava_sample": (_STATUS, [_P, _P, _P, _I32, c.POINTER(_Choice), c.POINTER(_Choice)]),
}

_EXCEPTIONS: dict[int, type[Exception]] = {
    1: ValueError,
    2: FileNotFoundError,
    3: OSError,
    4: errors.ModelFileError,
    5: errors.ModelMismatchError,
    6: errors.UnsupportedModelError,
    7: errors.ModelMemoryError,
    8: errors.ContextOverflowError,
    9: errors.GenerationCancelled,
    10: errors.NumericError,
    11: errors.DeviceError,
}


def _candidates() -> list[Path]:
    """Where the shared library may lie: beside the package wherever it is found, and where it was installed."""
    package = sys.modules[__name__.partition(".")[0]]
    folders = [Path(entry) / "lib" for entry in package.__path__]
    try:
        files = importlib.metadata.files("pyllava") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    folders += [Path(str(f.locate())).parent for f in files if f.name.startswith("libpyllava")]
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    names = [f"libpyllava.{suffix}", "pyllava.dll"]
    return [folder / name for folder in folders for name in names]


def _load() -> c.CDLL:
    override = os.environ.get("PYLLAVA_LIBRARY")
    paths = [Path(override)] if override else _candidates()
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(path.parent) for path in paths))
        raise ImportError(
            f"libpyllava is not built: looked in {looked}. Run `pip install .` in the source tree"
        )
    try:
        library = c.CDLL(str(found))
    except OSError as error:
        text = str(error) if str(found) in str(error) else f"{found}: {error}"
        raise ImportError(f"{text}{_plugins.advice(text)}") from None
    if library.pyllava_abi() != ABI:
        raise ImportError(f"{found}: ABI {library.pyllava_abi()}, this pyllava needs {ABI}: rebuild it")
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()


def version() -> str:
    """The version of the C library."""
    return str(lib.pyllava_version().decode())


def engine_version() -> str:
    """The version of ggml inside it."""
    return str(lib.pyllava_engine_version().decode())


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


def _check(status: int) -> None:
    if not status:
        return
    text = _UNPRINTABLE.sub("?", os.fsdecode(lib.pyllava_last_error()))
    if status in (2, 3):
        for code in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            path = text.removesuffix(f": {os.strerror(code)}")
            if path != text:
                raise OSError(code, os.strerror(code), path)  # FileNotFoundError and the like
    raise _EXCEPTIONS.get(status, errors.PyllavaError)(text)


_plugins_lock = threading.Lock()
_plugins_loaded: list[str] = []


def load_plugins() -> None:
    """Hands the library the back ends that lie in files: its own, then those of packages. Once, before any model.

    What cannot be used costs one warning; only without the CPU's is DeviceError raised. A library that holds its back ends
    itself, which is what a local build makes, has no such files.
    """
    with _plugins_lock:
        if _plugins_loaded:
            return
        own = _plugins.beside(Path(lib._name))
        if own:
            _check(_load_plugin(own[0]))
        elif not lib.pyllava_device_count():
            raise errors.DeviceError(f"{lib._name}: no back end of the CPU (libggml-cpu*) lies beside it")
        _plugins_loaded.extend(paths[0] for paths in own[:1] or [["built in"]])
        wrong = [_plugin_error(paths) for paths in own[1:]]
        for package, groups, text in _plugins.installed() if os.environ.get("PYLLAVA_PLUGINS") != "0" else ():
            found = [text, *(_plugin_error(paths) for paths in groups)]
            wrong += [f"{package} is not used: {error}" for error in filter(None, found)]
    for text in filter(None, wrong):
        logging.getLogger("pyllava").warning("%s", text)


def _load_plugin(paths: Sequence[str]) -> int:
    return int(lib.pyllava_plugin_load((_TEXT * len(paths))(*map(os.fsencode, paths)), len(paths)))


def _plugin_error(paths: Sequence[str]) -> str:
    if not _load_plugin(paths):
        return ""
    text = _UNPRINTABLE.sub("?", os.fsdecode(lib.pyllava_last_error()))
    return f"{text}{_plugins.advice(text)}"


def _i32(name: str, value: int) -> int:
    """`value`, if C's 32 bits hold it: ctypes would cut it silently."""
    number = operator.index(value)
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name}: found {number}, need a number of 32 bits")
    return number


def _pointer(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


class _Object:
    """A C object of this process: freed when nobody refers to it, and before the object that it was made from."""

    def __init__(self, free: str, address: int, parent: _Object | None) -> None:
        self.address, self.pid = address, os.getpid()
        self._finalizer = weakref.finalize(self, _free, free, address, self.pid, parent)
        self._finalizer.atexit = False


class _Use:
    """Keeps an object for a call; the references count, so no interrupt between two byte codes loses one."""

    __slots__ = ("_object",)

    def __init__(self, held: _Object) -> None:
        self._object: _Object | None = held

    def __enter__(self) -> int:
        assert self._object is not None
        return self._object.address

    def __exit__(self, *exception: object) -> None:
        self._object = None  # a traceback may outlive the call


class _Handle:
    """Owns one C object. It is freed by close(), or when nobody refers to it, but never while a call uses it.

    `parent` is the handle of an object that must outlive it. At the interpreter's end nothing is freed: the operating
    system takes the memory back.
    """

    def __init__(self, free: str, address: int | None, parent: _Handle | None = None) -> None:
        assert address
        self._pid = os.getpid()
        self._object: _Object | None = _Object(free, address, None if parent is None else parent.object())
        self._watch = weakref.ref(self._object)

    def object(self) -> _Object:
        """The object, which stays as long as somebody refers to it. Raises ClosedError, ForkError in a forked child."""
        if self.foreign:
            raise errors.ForkError(
                'the model was loaded before fork(): load it in the child, or start with "spawn"'
            )
        found = self._object
        if found is None or _exiting.is_set():
            raise errors.ClosedError("the model was closed")
        return found

    def use(self) -> _Use:
        """For ``with``: the object's address, for a call. Raises ClosedError after close, ForkError in a forked child."""
        return _Use(self.object())

    @property
    def busy(self) -> bool:
        """True while a call of this process uses it: somebody but this handle refers to the object."""
        held = self._watch()
        own = 1 if self._object is not None else 0
        return held is not None and not self.foreign and sys.getrefcount(held) > own + 2

    @property
    def foreign(self) -> bool:
        """True in a forked child."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Frees the object, or has the call that uses it free it at its end; a second call does nothing."""
        if not self.foreign:
            self._object = None


_exiting = threading.Event()
_sessions: weakref.WeakSet[SessionHandle] = weakref.WeakSet()


@atexit.register
def _end_running_calls() -> None:
    """Before the interpreter ends: daemon threads must not compute while the library's own objects are torn down."""
    _exiting.set()
    busy = [session for session in _sessions if session.handle.busy]
    for session in busy:
        session.cancel_at_exit()
    deadline = time.monotonic() + 10
    while any(session.handle.busy for session in busy) and time.monotonic() < deadline:
        time.sleep(0.005)


def _free(name: str, address: int, pid: int, parent: _Object | None) -> None:
    del parent  # it may go when this is done
    if os.getpid() == pid:  # a forked child does not own the threads behind it
        getattr(lib, name)(address)


class _Callback:
    """A Python callable as a C callback that never lets an exception through: it is kept and raised later."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def progress(self, fn: Progress | None) -> Any:
        if fn is None:
            return _PROGRESS_FN()

        def call(stage: bytes, fraction: float, _user: object) -> bool:
            try:
                return fn(stage.decode(), fraction) is not False
            except BaseException as error:
                self.error = error
                return False

        return _PROGRESS_FN(call)

    def log(self, fn: Log | None) -> Any:
        if fn is None:
            return _LOG_FN()

        def call(level: int, text: bytes, _user: object) -> None:
            try:
                fn(level, text.decode(errors="replace"))
            except BaseException as error:
                self.error = error

        return _LOG_FN(call)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


# --------------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """Something this build can compute on."""

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
    """All that this build finds on this machine."""
    load_plugins()
    found = []
    for i in range(lib.pyllava_device_count()):
        d = _Device()
        _check(lib.pyllava_device_describe(i, c.byref(d)))
        texts = (d.name.decode(), d.description.decode(errors="replace"), d.backend.decode())
        kind = ("cpu", "gpu", "integrated", "other")[d.kind]
        found.append(Device(*texts, kind, d.memory_free, d.memory_total))
    return found


# --------------------------------------------------------------------------------------------------- GGUF files

_NUMPY_TYPES = ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file; `shape` row-major, slowest first; `offset` in bytes from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int


class GgufHandle:
    """A parsed GGUF file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        address = _P()
        _check(lib.pyllava_gguf_open(_path(path), c.byref(address)))
        self._handle = _Handle("pyllava_gguf_free", address.value)

    def close(self) -> None:
        self._handle.close()

    def header(self) -> tuple[int, int]:
        """Version and alignment."""
        with self._handle.use() as at:
            return int(lib.pyllava_gguf_version(at)), int(lib.pyllava_gguf_alignment(at))

    def metadata(self) -> dict[str, object]:
        with self._handle.use() as at:
            return _metadata(at)

    def tensors(self) -> list[TensorInfo]:
        info, found = _TensorInfo(), []
        with self._handle.use() as at:
            for i in range(lib.pyllava_gguf_n_tensors(at)):
                _check(lib.pyllava_gguf_tensor(at, i, c.byref(info)))
                shape = tuple(info.shape[: info.n_dims])
                name, kind = info.name.decode(), info.type.decode()
                found.append(TensorInfo(name, kind, shape, info.size, info.offset))
        return found

    def records(self) -> dict[str, tuple[int, int]]:
        """Where the bytes of each key-value pair begin in the file, and how many they are."""
        kv, offset, size, found = _Kv(), _U64(), _U64(), {}
        with self._handle.use() as at:
            for i in range(lib.pyllava_gguf_n_kv(at)):
                _check(lib.pyllava_gguf_kv(at, i, c.byref(kv)))
                _check(lib.pyllava_gguf_record(at, i, c.byref(offset), c.byref(size)))
                found[kv.key.decode()] = (offset.value, size.value)
        return found


@dataclass(frozen=True)
class TensorType:
    """A number format of GGUF files: `block` elements are stored together in `block_bytes`."""

    name: str
    id: int
    block: int
    block_bytes: int
    can_quantize: bool
    can_dequantize: bool

    def n_bytes(self, n: int) -> int:
        """Bytes of `n` elements, a multiple of the block."""
        return n // self.block * self.block_bytes


@functools.cache
def tensor_type(name: str) -> TensorType:
    """The format of this name, in any case. Raises ValueError where there is none."""
    found = _TensorType()
    _check(lib.pyllava_tensor_type_find(name.encode(), c.byref(found)))
    name = found.name.decode()
    return TensorType(name, found.id, found.block, found.block_size, found.can_quantize, found.can_dequantize)


def quantize(x: FloatArray, kind: TensorType, out: npt.NDArray[np.uint8], first: int = 0) -> None:
    """f32 [n, k] to the bytes of `kind`, both contiguous. `first`: what messages call the first row."""
    rows = _Rows(kind.name.encode(), *x.shape, first, out.nbytes)
    _check(lib.pyllava_quantize(c.byref(rows), _pointer(x), _pointer(out)))


def dequantize(data: npt.NDArray[np.uint8], kind: TensorType, out: FloatArray, first: int = 0) -> None:
    """The bytes of n rows of `kind` to f32 [n, k], both contiguous."""
    rows = _Rows(kind.name.encode(), *out.shape, first, data.nbytes)
    _check(lib.pyllava_dequantize(c.byref(rows), _pointer(data), _pointer(out)))


def _string(file: int, i: int, item: int) -> str:
    text, size = _P(), _U64()
    _check(lib.pyllava_gguf_string(file, i, item, c.byref(text), c.byref(size)))
    return c.string_at(text.value or 0, size.value).decode(errors="replace") if size.value else ""


def _metadata(file: int) -> dict[str, object]:
    kv, found = _Kv(), {}
    for i in range(lib.pyllava_gguf_n_kv(file)):
        _check(lib.pyllava_gguf_kv(file, i, c.byref(kv)))
        values: list[object]
        if kv.item_type == 8:
            values = [_string(file, i, item) for item in range(kv.n)]
        else:
            dtype = np.dtype(_NUMPY_TYPES[kv.item_type])
            raw = c.string_at(kv.data, kv.n * dtype.itemsize) if kv.n else b""
            values = list(np.frombuffer(raw, dtype).tolist())
        found[kv.key.decode()] = values if kv.type == 9 else values[0]
    return found


def _path(path: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path {os.fspath(path)!r} holds a zero byte")
    return encoded


# --------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class ModelInfo:
    """The numbers of a loaded model, named as in ``csrc/pyllava.h``; image fields are 0 without a projector."""

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
    has_vision: bool
    image_size: int
    patch_size: int
    n_image_tokens: int
    n_embd_vision: int
    n_layer_vision: int
    n_layer_vision_run: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    anyres: bool
    pinpoints: tuple[tuple[int, int], ...]
    size: int
    size_vision: int


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
    """What a session is made with, named as in ``csrc/pyllava.h``; in a plan, 0 stands for what is usual."""

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
        """Fields of ``_ModelParams``. "auto" is what $PYLLAVA_DEVICE says, if it says something."""
        shares = () if self.tensor_split is None else tuple(map(float, self.tensor_split))
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


def _text(name: str, value: str) -> bytes:
    """`value` for C: as the environment or the command line may have given it."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name}: found {value!r}, need a text")
    return os.fsencode(value)


def _refuse_devices_after_fork(placement: Placement) -> None:
    """A device that was used before fork() is of no use behind it: back ends hang or end the process."""
    wants = not (placement.device == "cpu" and placement.vision_device in ("auto", "cpu"))
    if wants and any(pid != os.getpid() for pid in _device_users):
        raise errors.ForkError(
            'devices were used before fork(): start processes with "spawn", or load with device="cpu"'
        )


_device_users: set[int] = set()


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

    def metadata(self) -> dict[str, object]:
        with self._handle.use() as at:
            return _metadata(lib.pyllava_model_file(at))

    def mmproj_metadata(self) -> dict[str, object]:
        with self._handle.use() as at:
            file = lib.pyllava_model_mmproj(at)
            return _metadata(file) if file else {}

    def tokenize(
        self, text: str, *, plain: Sequence[tuple[int, int]] = (), add_bos: bool = False
    ) -> list[int]:
        """Token ids; special tokens are recognised except in the byte ranges `plain`."""
        encoded = text.encode()
        ranges = (_Range * len(plain))(*(_Range(*r) for r in plain)) if plain else None
        n, room = _U64(), len(encoded) + 2
        while True:
            ids = np.empty(room, np.int32)
            out = (_pointer(ids), room, c.byref(n))
            with self._handle.use() as at:
                status = lib.pyllava_tokenize(at, encoded, len(encoded), ranges, len(plain), add_bos, *out)
            if status == 0 or n.value <= room:
                _check(status)
                return [int(i) for i in ids[: n.value]]
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

    def is_end(self, token: int) -> bool:
        """True if the token ends an answer."""
        with self._handle.use() as at:
            return bool(lib.pyllava_token_is_end(at, token))


# --------------------------------------------------------------------------------------------------- session


@dataclass(frozen=True)
class Tokens:
    """Part of a prompt: token ids."""

    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens(self.ids[start:stop])

    def contents(self) -> npt.NDArray[np.uint64]:
        """What each row holds, as one number."""
        return np.array(self.ids, np.int64).astype(np.uint64)


@dataclass(frozen=True)
class Rows:
    """Part of a prompt: image embeddings float32 [n, n_embd]; `key` (64 bits) names the picture."""

    embd: FloatArray
    key: int

    def __len__(self) -> int:
        return len(self.embd)

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows, which hold the same as before."""
        return Rows(self.embd[start:stop], (self.key + _ROW * start) % 2**64)

    def contents(self) -> npt.NDArray[np.uint64]:
        """What each row holds, as one number, which is no token's."""
        rows = np.arange(len(self), dtype=np.uint64) * np.uint64(_ROW)
        found: npt.NDArray[np.uint64] = (rows + np.uint64(self.key % 2**64)) | np.uint64(2**63)
        return found


Span: TypeAlias = Tokens | Rows

_ROW = 0x9E3779B97F4A7C15  # what is added to a picture's key from row to row, in prompt.c too

LAST = -1
NOTHING = 2**31 - 1


@dataclass(frozen=True)
class Run:
    """Positions of one sequence in a step, and what is wanted of them; see ``pyllava_run`` in ``csrc/pyllava.h``."""

    parts: Sequence[Span]
    seq: int = 0
    append: bool = False
    """They follow what the sequence holds; else they are all that it is to hold."""
    answer: bool = False
    """Rows of an answer, else of a prompt."""
    first: int = LAST
    """The row from which on logits are wanted; LAST, or NOTHING."""
    sampler: SamplerHandle | None = None
    """Chooses after the last row, instead of logits; with `mask` and `n_alternatives` as its sample() has them."""
    mask: npt.NDArray[np.uint32] | None = None
    n_alternatives: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of logits."""
        if self.first < LAST:
            raise ValueError(f"first: found {self.first}, need {LAST} or more")
        if self.sampler is not None:
            return 0
        return 1 if self.first == LAST else max(0, sum(map(len, self.parts)) - self.first)


@dataclass(frozen=True)
class Ran:
    """What a run of a step has given."""

    logits: FloatArray
    """float32 [n_rows, n_vocab]"""
    n_reused: int
    """Rows that the sequence held already."""
    choice: Choice | None


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
        """cancel() while no further call is let in."""
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
        """Runs for C, the logits and the choices they give, and what to keep until that is done."""
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
        """Computes all runs or none, each of another sequence."""
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
        """Up to `n_steps` steps of answers in one call: each run's choices, of which the next step appends each.

        The runs append rows of answers and have samplers. Ends early after a token that ends an answer, or after
        `seconds`.
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

    def seq_shared(self, seq: int, runs: Sequence[Run]) -> int:
        """Rows that a sequence begins with that are those of these runs, one after the other, by content and kind."""
        n, packed = _I32(), (_Run * max(len(runs), 1))()
        keep = []
        for target, run in zip(packed, runs, strict=False):
            keep.append(self._spans(run.parts))
            target.kind, target.spans, target.n_spans = int(run.answer), keep[-1][0], len(run.parts)
        with self._handle.use() as at:
            _check(lib.pyllava_seq_shared(at, _i32("seq", seq), packed, len(runs), c.byref(n)))
        return n.value

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


# --------------------------------------------------------------------------------------------------- sampler


@dataclass(frozen=True)
class Choice:
    """A token, and what the model itself thinks of it: before mask, penalty, cuts and temperature."""

    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """(id, log_prob) of the tokens that the model finds most probable, as many as were asked for."""


@dataclass(frozen=True)
class _Asked:
    """Room for what a sampler chooses in each of some steps, and what it reads."""

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


class SamplerHandle:
    """Random state and the recent tokens of one answer, for the vocabulary of one model."""

    def __init__(
        self,
        model: ModelHandle,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = 0,
    ) -> None:
        params = _SamplerParams(
            temperature,
            _i32("top_k", top_k),
            top_p,
            min_p,
            repeat_penalty,
            _i32("repeat_last_n", repeat_last_n),
            operator.index(seed) & (2**64 - 1),
        )
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

        mask: uint32 [(n_vocab + 31) // 32]; a token may be chosen whose bit is set, id % 32 of word id // 32.
        Raises ValueError where it leaves none.
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
        """Tells a run what is to be chosen, in each step; what it gives has to be kept until that is done."""
        if mask is not None and mask.dtype != np.uint32:
            raise ValueError(f"mask: found {mask.dtype}, need uint32")
        n_words = (self._n_vocab + 31) // 32  # a copy: it is read when all is computed
        words = None if mask is None else self._sized("mask", mask, np.uint32, n_words).copy()
        if not 0 <= n_alternatives <= self._n_vocab:  # before room for them is taken
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
