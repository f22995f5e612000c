"""For PyInstaller: the library with the back ends beside it, the demo models, and the modules that names alone lead to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from PyInstaller.utils.hooks import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
    collect_data_files,
    collect_submodules,
    copy_metadata,
)

_found = importlib.util.find_spec("pyllava")
_folders = [Path(folder) / "lib" for folder in _found.submodule_search_locations or []] if _found else []

hiddenimports = (
    collect_submodules(  # pyllava.cli imports its commands by name, pyllava its own parts when they are used
        "pyllava", filter=lambda name: not name.startswith(("pyllava._pyinstaller", "pyllava.convert"))
    )
)
datas = collect_data_files("pyllava", includes=["models/*"])
datas += copy_metadata("pyllava")
binaries = [
    (str(file), "pyllava/lib")
    for folder in _folders
    if folder.is_dir()
    for file in folder.iterdir()
    if ".so" in file.suffixes or file.suffix in (".dll", ".dylib")
]
