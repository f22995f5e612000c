"""Finds back ends in separate files (docs/building.md): beside the library, and in installed packages.

A package with one names itself in the entry-point group ``pyllava.backends``. It is not imported; only its
installed files are looked at. ggml's own search, which includes the current directory, is never used.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

GROUP = "pyllava.backends"
_FILE = re.compile(r"(?:lib)?ggml-([a-z0-9]+)(?:-[\w.]+)?\.(?:so|dll)")

_ADVICE = {
    r"pyllava-ggml": "it belongs to another version of pyllava; install the same version of both",
    r"libcuda\.|nvcuda": "NVIDIA's driver is not installed here. A build with -C cmake.define.GGML_CUDA_NO_VMM=ON "
    "loads without it and then computes on the CPU",
    r"libcu|cudart|cublas|nccl": "a part of the CUDA toolkit is not found; install the version it was built with, "
    "or name its folder in LD_LIBRARY_PATH",
    r"vulkan": "the Vulkan loader is not installed here (Debian: libvulkan1)",
    r"amdhip|hipblas|rocblas|rccl": "ROCm is not found; install the version it was built with, or name its "
    "folder in LD_LIBRARY_PATH",
    r"sycl|libmkl|libdnnl|libsvml|libimf|libintlc": "oneAPI is not found; `source setvars.sh` first",
    r"GLIBC|GLIBCXX|CXXABI": "it was built on a newer system; build it on this one",
}


def advice(error: str) -> str:
    """Advice on the system's error for a file that it would not load, or nothing."""
    # The text begins with the file that would not load; the advice is about the missing one.
    missing = re.search(
        r"([^/\s:]+): cannot open shared object|Library not loaded: (\S+)|version `(\w+)", error
    )
    what = next(filter(None, missing.groups()), "") if missing else ""
    text = next((text for pattern, text in _ADVICE.items() if what and re.search(pattern, what)), "")
    return f" ({text})" if text else ""


def alternatives(files: list[Path]) -> list[list[str]]:
    """Groups of paths, one per back end, the CPU's first; one file of each group is to be loaded."""
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        name = _FILE.fullmatch(file.name)
        if name:
            groups.setdefault(name[1], []).append(str(file.resolve()))
    return sorted(groups.values(), key=lambda paths: "ggml-cpu" not in Path(paths[0]).name)


def beside(library: Path) -> list[list[str]]:
    """Back ends that were built with the library."""
    return alternatives(list(library.parent.iterdir()))


def installed() -> Iterator[tuple[str, list[list[str]], str]]:
    """(package and version, its back ends, what is wrong with it) of each package with an entry point."""
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist
        if package is None or Path(str(package.locate_file(""))).resolve() == Path.cwd():
            continue  # a package in the current directory is not installed
        found = [
            (Path(str(file.locate())), file.size)
            for file in package.files or []
            if _FILE.fullmatch(file.name)
        ]
        wrong = "" if found else "it holds no back end"
        for path, size in found:
            if not path.is_file() or size not in (None, path.stat().st_size):
                wrong = f"{path} is not as it was installed"
        groups = [] if wrong else alternatives([path for path, _ in found])
        yield f"{package.metadata['Name']} {package.version}", groups, wrong
