"""Memory that runs out at any request of the library: a typed error, the process alive, the next call right.

Each failure happens in a process of its own (`memory_sweep.py`), of which ten thousand take minutes: by default a few
dozen, spread over all calls, and all of them with ``pytest -m slow``.
"""

from __future__ import annotations

import ctypes
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
TELLS = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
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


CYCLES = """
import ctypes, gc, os, sys, threading
import pyllava

class Info(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def held():
    gc.collect()
    info = libc.mallinfo2()
    counts = len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))
    return info.uordblks + info.hblkhd, sys.getallocatedblocks(), counts

def cycles(n):
    for _ in range(n):
        with pyllava.Llava(*sys.argv[2:], n_ctx=128, n_threads=2) as model:
            model.ask(None, "x", max_tokens=4)

n = int(sys.argv[1])
cycles(60)
before = held()
cycles(n)
after = held()
print(after[0] - before[0], after[1] - before[1], after[2] == before[2])
"""


@pytest.mark.skipif(not TELLS, reason="glibc 2.33 and later tell what is held")
@pytest.mark.parametrize(
    ("n", "which"),
    [
        (60, "tiny"),
        pytest.param(3000, "tiny", marks=pytest.mark.slow),
        pytest.param(1000, "demo", marks=pytest.mark.slow),
    ],
)
def test_load_and_close_leave_nothing(files: dict[str, tiny_gguf.Files], n: int, which: str) -> None:
    """Beyond what the first cycles take for good; what glibc keeps free for its next requests is not looked at."""
    model = [str(files["f32"].model), str(files["f32"].mmproj)] if which == "tiny" else []
    command = [sys.executable, "-c", CYCLES, str(n), *model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    n_bytes, n_objects, same = done.stdout.split()
    assert int(n_bytes) < 65_536 + 8 * n
    assert int(n_objects) < 500 + n // 20
    assert same == "True"
