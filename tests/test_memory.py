"""Memory that runs out at any request of the library: a typed error, the process alive, the next call right.

Each failure happens in a process of its own (`memory_sweep.py`), of which ten thousand take minutes: by default a few
dozen, spread over all calls, and all of them with ``pytest -m slow``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from tiny import TinySpec

from pyllava.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "tests" / "c" / "failing_memory.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the allocations of glibc are made to fail"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("shim") / "failing_memory.so"
    command = [str(COMPILER), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", found, SHIM], check=True)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny_gguf.Files]:
    """Of types that our kernels multiply, and of one that some of ggml's threads do."""
    folder = tmp_path_factory.mktemp("memory")
    usual = tiny_gguf.convert(folder, TinySpec(seed=60))
    quantize(usual.model, folder / "q5_0.gguf", "q5_0")
    return {"f32": usual, "q5_0": tiny_gguf.Files(folder / "q5_0.gguf", usual.mmproj)}


def sweep(shim: Path, files: tiny_gguf.Files, *options: str) -> Iterator[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "tests" / "memory_sweep.py"), str(files.model), str(files.mmproj)]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return map(json.loads, done.stdout.splitlines())


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("exact", "f32"), ("fast", "q5_0"), pytest.param("fast", "f32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("most", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_memory_that_runs_out(
    shim: Path, files: dict[str, tiny_gguf.Files], precision: str, kind: str, most: int
) -> None:
    found = list(sweep(shim, files[kind], "--precision", precision, "--most", str(most)))
    assert len(found) >= 60
    assert [each for each in found if not each["right"]] == []
    failed = [each for each in found if each["found"]["first"].startswith("memory")]
    assert len(failed) > 0.9 * len(found)  # some calls can do without what they asked for
