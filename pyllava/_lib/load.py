"""Finds and loads the library and its back ends in other files, and reads the last error."""

from __future__ import annotations

import ctypes as c
import errno
import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from .. import _plugins, errors
from .._plain import plain
from .functions import _TEXT, FUNCTIONS, QUICK

ABI = 7

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
    """Paths to try: `lib` in each folder of the package, and where it was installed."""
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


def _missing(looked: str) -> str:
    """What is said where there is no library, and what to do."""
    if getattr(sys, "frozen", False):
        return (
            f"libpyllava is not in this program: looked in {looked}. Freeze it with PyInstaller, which finds pyllava's own "
            "hook, or have the files of the package (pyllava/lib, pyllava/models) included"
        )
    return f"libpyllava is not built: looked in {looked}. Run `pip install .` in the source tree"


def _load() -> c.CDLL:
    override = os.environ.get("PYLLAVA_LIBRARY")
    paths = [Path(override)] if override else _candidates()
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(path.parent) for path in paths))
        raise ImportError(_missing(looked))
    try:
        library = c.CDLL(str(found))
    except OSError as error:
        text = str(error) if str(found) in str(error) else f"{found}: {error}"
        raise ImportError(f"{text}{_plugins.advice(text)}") from None
    if library.pyllava_abi() != ABI:
        raise ImportError(f"{found}: ABI {library.pyllava_abi()}, this pyllava needs {ABI}: rebuild it")
    quick = c.PyDLL(library._name, handle=library._handle)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(quick if name in QUICK else library, name)
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


lib = _load()


def version() -> str:
    """The version of the C library."""
    return str(lib.pyllava_version().decode())


def engine_version() -> str:
    """The version of ggml inside it."""
    return str(lib.pyllava_engine_version().decode())


def _check(status: int) -> None:
    if not status:
        return
    text = plain(os.fsdecode(lib.pyllava_last_error()))
    if status in (2, 3):
        for code in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            path = text.removesuffix(f": {os.strerror(code)}")
            if path != text:
                raise OSError(code, os.strerror(code), path)  # FileNotFoundError and the like
    raise _EXCEPTIONS.get(status, errors.PyllavaError)(text)


_plugins_lock = threading.Lock()
_plugins_loaded: list[str] = []


def load_plugins() -> None:
    """Loads the back ends in files, once, before any model: the library's own, then those of packages.

    A file that cannot be used costs one warning; DeviceError is raised only without the CPU's. A local build
    has its back ends in the library itself, and no such files.
    """
    with _plugins_lock:
        if _plugins_loaded:
            return
        own = _plugins.beside(Path(lib._name))
        if own:
            _check(_load_plugin(own[0]))
        elif not device_count():
            raise errors.DeviceError(f"{lib._name}: no back end of the CPU (libggml-cpu*) lies beside it")
        _plugins_loaded.extend(paths[0] for paths in own[:1] or [["built in"]])
        wrong = [_plugin_error(paths) for paths in own[1:]]
        for package, groups, text in _plugins.installed() if os.environ.get("PYLLAVA_PLUGINS") != "0" else ():
            found = [text, *(_plugin_error(paths) for paths in groups)]
            wrong += [f"{package} is not used: {error}" for error in filter(None, found)]
    for text in filter(None, wrong):
        logging.getLogger("pyllava").warning("%s", text)


def device_count() -> int:
    """How many devices there are."""
    found = int(lib.pyllava_device_count())
    _check(max(-found, 0))
    return found


def _load_plugin(paths: Sequence[str]) -> int:
    return int(lib.pyllava_plugin_load((_TEXT * len(paths))(*map(os.fsencode, paths)), len(paths)))


def _plugin_error(paths: Sequence[str]) -> str:
    if not _load_plugin(paths):
        return ""
    text = plain(os.fsdecode(lib.pyllava_last_error()))
    return f"{text}{_plugins.advice(text)}"
