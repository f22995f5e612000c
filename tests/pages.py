"""The examples of documentation pages, and a place where they run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent

NOT_HERE = {
    r"pip (install|wheel) ": "installs",
    r"(apt-get|git|docker|auditwheel|sbatch|gh|twine|MODEL=\S+ uvicorn|curl) ": "another program",
    r"python (packaging|bench|convert)/|python -m examples|pytest": "a checkout, and minutes",
    r"cp \.\./|mkdir vit": "files of a checkpoint",
    r"pyllava-cli caption /data": "a cluster",
    r"pyllava-cli (pull|rm|-hf|(-m|info) llava-1.6) ?": "the network",
    r"pyllava-cli (convert|.*(mmproj vit|models/joycaption|llava-v1.6-vicuna-7b))": "a published checkpoint",
}
"""How commands begin that no test runs, and what they would need."""


@dataclass(frozen=True)
class Example:
    """A fenced block of commands or of Python, and what the page says that it prints (None: it does not say)."""

    language: str
    code: str
    line: int
    printed: str | None


_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>sh|python)\n(?P<code>.*?)^ *```$(?:\n\s*^ *```text\n(?P<printed>.*?)^ *```$)?",
    re.DOTALL | re.MULTILINE,
)


def examples(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    return [
        Example(
            found["language"],
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start()) + 1,
            None if found["printed"] is None else textwrap.dedent(found["printed"]),
        )
        for found in _BLOCK.finditer(text)
    ]


def runnable(code: str) -> str:
    """The commands of a block that can run in `workplace`."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return "\n".join(line for line in lines if line and not any(re.match(begin, line) for begin in NOT_HERE))


def workplace(folder: Path) -> Path:
    """What the examples speak of: pictures, and the demo models under the names of published ones."""
    models, photos = ROOT / "pyllava" / "models", folder / "photos"
    for name, demo in (("llava-v1.5-7b", "demo"), ("llava-v1.6-mistral-7b", "demo-1.6")):
        place = folder / "models" / name
        place.mkdir(parents=True)
        (place / "ggml-model-f16.gguf").symlink_to(models / f"{demo}-q8_0.gguf")
        (place / "mmproj-model-f16.gguf").symlink_to(models / f"{demo}-mmproj-q8_0.gguf")
    for name in ("ggml-model-f16.gguf", "mmproj-model-f16.gguf"):
        shutil.copy(folder / "models" / "llava-v1.5-7b" / name, folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    photos.mkdir()
    scenes = ("scene", "duck", "hearts", "sign", "bread")
    for name, scene in zip(("cat", "dog", "photo", "a", "b"), scenes, strict=True):
        with Image.open(ROOT / "examples" / f"{scene}.png") as image:
            image.convert("RGB").save(folder / f"{name}.jpg", quality=95)
            image.save(folder / f"{name}.png")
    for scene in scenes:
        shutil.copy(ROOT / "examples" / f"{scene}.png", photos)
    (folder / "bin").mkdir()
    for program, words in (("pyllava-cli", "-m pyllava"), ("python", "")):
        path = folder / "bin" / program
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        path.chmod(0o755)
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COLUMNS")}
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {
        **kept,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def run(command: Sequence[str], folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_shell(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(["bash", "-euo", "pipefail", "-c", code], folder)


def check(done: subprocess.CompletedProcess[str], what: str = "") -> None:
    """Skips the test where a package is not installed, and fails it where anything else went wrong."""
    if done.returncode and (found := lacking(done.stderr)):
        pytest.skip(found)
    assert done.returncode == 0, f"{what}\n{done.stderr}"


def lacking(said: str) -> str | None:
    """The package that is not installed here, where that is what an example's stderr says."""
    found = re.search(r"pip install '?pyllava\[\w+\]'?|No module named '(?!pyllava|tests)\w+", said)
    return found and found[0]


_DRIVER = """
import contextlib, io, json, sys
from pathlib import Path
import pyllava
names = {"pyllava": pyllava, "paths": sorted(Path("photos").iterdir())}
printed = []
for where, code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(code, where, "exec"), names)
    printed.append(text.getvalue())
json.dump(printed, sys.stdout)
"""


def run_python(blocks: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    """What each of a page's blocks (where it stands, its code) prints.

    They run in one process, with the names of those before, but for programs, which start processes of their own.
    """
    programs = {where: code for where, code in blocks if "__main__" in code}
    together = [block for block in blocks if block[0] not in programs]
    done = run([sys.executable, "-c", _DRIVER], folder, json.dumps(together))
    check(done)
    printed = dict(zip((where for where, _ in together), json.loads(done.stdout), strict=True))
    for where, code in programs.items():
        (folder / "program.py").write_text(code, encoding="utf-8")
        done = run([sys.executable, "program.py"], folder)
        check(done)
        printed[where] = done.stdout
    return [printed[where] for where, _ in blocks]
