#!/usr/bin/env python3
"""Tries a wheel as its users will: a new environment, an answer, the symbols, and older processors under QEMU.

    python packaging/check_wheel.py dist/pyllava-*.whl [--cpu Haswell --cpu Nehalem --cpu core2duo]

QEMU (qemu-user) runs the whole interpreter with the instructions of the named processor: one that it lacks ends the run.
NumPy 2 needs SSE4.2; processors before Nehalem are tried with NumPy 1.26, which needs a Python that has wheels of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SCENE = Path(__file__).parent.parent / "examples" / "scene.png"
QUESTION = "What is in the picture?"
ANSWER = "There is a large orange square at the top left"
OLD = {"core2duo", "Conroe", "Penryn", "qemu64"}
EXPORTS = {"libpyllava": r"pyllava_\w+", "libggml-": r"ggml_backend_(init|score)"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--cpu", action="append", default=[], help="a model of qemu-x86_64 -cpu help; several"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check_files(options.wheel, Path(folder))
        python = environment(Path(folder) / "venv", options.wheel)
        answer("this processor", [python])
        old = ""
        for cpu in options.cpu:
            if cpu in OLD:
                old = old or environment(Path(folder) / "old", options.wheel, "numpy<2")
            answer(cpu, ["qemu-x86_64", "-cpu", cpu, old if cpu in OLD else python])


def check_files(wheel: Path, folder: Path) -> None:
    """Sizes, exported symbols, and where the libraries look for each other."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"\.(so|dylib|dll)$", name)]
        archive.extractall(folder / "wheel", names)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} libraries")
    for name in names:
        path = folder / "wheel" / name
        exported = set()
        for line in run(["nm", "-D", "--defined-only", str(path)]).splitlines():
            exported.add(line.split()[-1].split("@")[0])
        pattern = next((p for prefix, p in EXPORTS.items() if path.name.startswith(prefix)), None)
        if path.stem.startswith("libpyllava-ggml"):
            pattern = None  # the engine's own interface, C++ in part
        wrong = [symbol for symbol in exported if pattern and not re.fullmatch(pattern, symbol)]
        if wrong:
            sys.exit(f"{name} exports {', '.join(sorted(wrong)[:5])}")
        print(f"  {path.stat().st_size / 1e6:6.2f} MB {len(exported):5} symbols  {name}")
    if shutil.which("auditwheel"):
        print(run(["auditwheel", "show", str(wheel)]).strip())


def environment(folder: Path, wheel: Path, *others: str) -> str:
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel), *others])
    return python


def answer(where: str, command: list[str]) -> None:
    start = time.monotonic()
    for precision in ("fast", "exact"):
        words = ["-m", "pyllava", "--image", str(SCENE), "-p", QUESTION, "--precision", precision]
        text = run([*command, *words], cwd="/")
        if not text.startswith(ANSWER):
            sys.exit(f"{where}, {precision}: {text}")
    print(f"{where}: answered in both precisions, {time.monotonic() - start:.0f} s", flush=True)


def run(command: list[str], cwd: str | None = None) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYLLAVA"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
