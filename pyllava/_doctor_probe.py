"""What only the compiled library knows, for `_doctor`: found out in a process of its own, which may end in the middle.

Each part is a line of JSON on stdout as soon as it is known: what came before a crash is not lost.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ._terminal import one_line

Section = dict[str, Any]

NAMES = ("library", "devices", "instructions", "self_test")
_SETS = ("avx512vnni", "avx512", "avxvnni", "avx2", "neoni8mm", "neondot", "neon", "plain")
"""The instruction sets that the fast mode has tables for, the best first, as in ``ggml/kernels/cpu.c``."""
_CHOICE = "PYLLAVA_CPU"
_QUESTIONS = {
    "What is in the picture?": "There is a large blue square at the top left and a large red circle in the center, "
    "on a white background.",
    "How many shapes are there?": "2",
    "What color is the circle?": "Red",
}


def probe() -> None:
    """Prints the parts, one after the other."""
    for name, section in sections():
        print(json.dumps({name: section}), flush=True)


def sections() -> Iterator[tuple[str, Section]]:
    """Name and contents of each part; where there is no library, of the first one alone."""
    for name, make in zip(NAMES, (_library, _devices, _instructions, _self_test), strict=True):
        section = tried(make)
        yield name, section
        if name == "library" and "error" in section:
            return


def tried(make: Callable[[], Section]) -> Section:
    """What make() finds out, or why it could not."""
    try:
        return make()
    except Exception as error:  # whatever it is, the rest of the page is wanted
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _library() -> Section:
    from . import _lib

    path = Path(_lib.lib._name)
    return {
        "path": str(path),
        "found": "PYLLAVA_LIBRARY" if os.environ.get("PYLLAVA_LIBRARY") else "in the package",
        "version": _lib.version(),
        "abi": int(_lib.lib.pyllava_abi()),
        "ggml": _lib.engine_version(),
        "bytes": path.stat().st_size,
        "built": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
    }


class _Told(logging.Handler):
    """Keeps what the library logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _devices() -> Section:
    """Devices, the files of back ends, and what the library said of those that it does not use."""
    from . import _lib, _plugins

    told = _Told()
    logger = logging.getLogger("pyllava")
    logger.addHandler(told)
    try:
        found = _lib.devices()
    finally:
        logger.removeHandler(told)
    beside = _plugins.beside(Path(_lib.lib._name))
    wants_packages = os.environ.get("PYLLAVA_PLUGINS") != "0"
    packages = [
        f"{package}: {wrong or ', '.join(Path(paths[0]).name for paths in groups)}"
        for package, groups, wrong in (_plugins.installed() if wants_packages else ())
    ]
    return {
        "devices": [dataclasses.asdict(device) for device in found],
        "back_ends_built_in": not beside,
        "files_beside_the_library": [" or ".join(Path(path).name for path in paths) for paths in beside],
        "packages_with_back_ends": packages if wants_packages else "not looked for: PYLLAVA_PLUGINS=0",
        "not_used": told.lines,
    }


def _instructions() -> Section:
    """Which instruction sets the library's own kernels use here. It is asked, by name: no guess from the CPU's flags."""
    wanted = os.environ.get(_CHOICE)
    try:
        runs = [name for name in _SETS if _has(name)]
    finally:
        os.environ.pop(_CHOICE, None)
        if wanted is not None:
            os.environ[_CHOICE] = wanted
    both = next((name for name in ("avx512", "avx2") if name in runs), "plain")
    if wanted is None:
        chosen, why = runs[0], "it is the best that runs here"
    elif wanted in runs:
        chosen, why = wanted, f"{_CHOICE} names it"
    else:
        chosen, why = "none", f"{_CHOICE}={wanted} is not among them"
    return {
        "run_here": " ".join(runs),
        "products_and_attention_of_the_fast_mode": chosen,
        "because": why,
        "products_of_the_exact_mode_and_what_both_share": both,
        "all_else": "ggml's own choice: that of its build, or of the file that was loaded",
    }


def _has(name: str) -> bool:
    from . import _lib, models

    os.environ[_CHOICE] = name
    files = models.find(None, None)
    model = _lib.ModelHandle(files.model, None, placement=_lib.Placement(device="cpu"))
    try:
        _lib.SessionHandle(model, n_ctx=8, n_threads=1, precision="fast").close()
    except ValueError:
        return False
    finally:
        model.close()
    return True


def _self_test() -> Section:
    """The demo model is asked about a picture that is drawn here."""
    from PIL import Image, ImageDraw

    from .llava import Llava

    picture = Image.new("RGB", (1344, 1344), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((500, 500, 1000, 1000), fill=(220, 40, 40))
    draw.rectangle((100, 100, 500, 450), fill=(40, 80, 220))
    answers: list[Section] = []
    with Llava(n_ctx=512) as model:
        for question, wanted in _QUESTIONS.items():
            started = time.perf_counter()
            text = str(model.ask(picture.resize((336, 336)), question, max_tokens=60))
            ms = round((time.perf_counter() - started) * 1000, 1)
            answers.append({"question": question, "answer": text, "ms": ms, "is_right": text == wanted})
        section: Section = {"load_ms": round(model.load_seconds * 1000, 1), "devices": str(model.devices)}
    wrong = [answer["question"] for answer in answers if not answer["is_right"]]
    section |= {"answers": answers, "is_right": not wrong}
    if wrong:
        need = "; ".join(_QUESTIONS[question] for question in wrong)
        section["error"] = (
            f"{len(wrong)} of {len(answers)} answers are wrong, the model computes nonsense here: need {need}"
        )
    return section


def command() -> list[str]:
    """The command line of that process: this Python, with the same modules, from wherever it is started."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from pyllava import _doctor_probe; _doctor_probe.probe()"
    return [sys.executable, "-c", code]
