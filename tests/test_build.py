"""Building from source: what is said where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.name == "nt", reason="compilers are found there without the PATH")
@pytest.mark.parametrize("missing", ["C", "C++"])
def test_a_compiler_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    """In pyllava's own words, before anything is fetched."""
    cmake, make, compiler = shutil.which("cmake"), shutil.which("make"), shutil.which("gcc")
    if cmake is None or make is None or compiler is None:
        pytest.skip("needs cmake, make and gcc")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "uname", *(("gcc", "as", "ld", "ar", "ranlib") if missing == "C++" else ())):
        (tools / name).symlink_to(shutil.which(name) or name)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run(
        [cmake, "-G", "Unix Makefiles", "-S", ROOT, "-B", tmp_path / "build"],
        env={**environment, "PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 1
    assert (
        f"no {missing} compiler was found, and pyllava is built from source here: install one (Debian" in said
    )
    assert not (tmp_path / "build" / "ggml").exists()
