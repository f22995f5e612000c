"""Back ends in files of their own: which are found, and that none of them ends the process or stands in the CPU's way."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyllava import _lib, _plugins

ROOT = Path(__file__).parent.parent


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    """What pip leaves of a wheel: its files, and its metadata with an entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{_plugins.GROUP}]\n{name} = {name}\n")
    record = [f"{info.name}/METADATA,,", f"{info.name}/entry_points.txt,,", f"{info.name}/RECORD,,"]
    for path, data in files.items():
        (site / name).mkdir(exist_ok=True)
        (site / name / path).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name}/{path},sha256={digest},{len(data)}")
    (info / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def found(name: str) -> tuple[list[list[str]], str]:
    return next(
        (groups, wrong) for package, groups, wrong in _plugins.installed() if package == f"{name} 1.0"
    )


def test_files_are_grouped_by_back_end_and_the_cpu_comes_first(tmp_path: Path) -> None:
    names = ["libggml-blas.so", "libggml-cpu-haswell.so", "libggml-cpu-x64.so", "libpyllava.so", "notes.txt"]
    files = [
        tmp_path / name for name in [*names, "libpyllava-ggml-base-0.15.3.so", "libpyllava-ggml-0.15.3.so"]
    ]
    groups = [[Path(path).name for path in group] for group in _plugins.alternatives(files)]
    assert groups == [["libggml-cpu-haswell.so", "libggml-cpu-x64.so"], ["libggml-blas.so"]]


def test_a_package_names_its_files_and_is_not_imported(site: Path) -> None:
    install(
        site, "llava_gpu", {"libggml-gpu.so": b"x", "__init__.py": b"raise SystemExit(3)", "other.so": b""}
    )
    assert found("llava_gpu") == ([[str((site / "llava_gpu" / "libggml-gpu.so").resolve())]], "")
    assert "llava_gpu" not in sys.modules


def test_a_file_cut_short_is_not_opened(site: Path) -> None:
    install(site, "llava_gpu", {"libggml-gpu.so": b"longer"})
    (site / "llava_gpu" / "libggml-gpu.so").write_bytes(b"long")
    groups, wrong = found("llava_gpu")
    assert groups == []
    assert wrong.endswith("libggml-gpu.so is not as it was installed")


def test_the_current_directory_is_not_searched(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "llava_gpu", {"libggml-gpu.so": b"x"})
    monkeypatch.chdir(site)
    assert not [package for package, *_ in _plugins.installed() if package.startswith("llava_gpu")]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "driver"),
        ("/a/libpyllava.so: libcublas.so.13: cannot open shared object file: No such file", "toolkit"),
        (
            "/a/libggml-cuda.so: libpyllava-ggml-base-0.15.3.so: cannot open shared object file",
            "same version",
        ),
        ("/lib/libc.so.6: version `GLIBC_2.38' not found (required by /a/libpyllava.so)", "newer system"),
        ("/a/libggml-cuda.so: file too short", None),
    ],
)
def test_what_is_missing_is_explained(error: str, word: str | None) -> None:
    assert word in _plugins.advice(error) if word else _plugins.advice(error) == ""


def test_paths_are_checked() -> None:
    assert _lib.lib.pyllava_plugin_load(None, 0) == 1
    assert _lib.load._load_plugin(["/nowhere/libggml-gpu.so"]) == 11


def test_broken_packages_cost_a_warning_each_and_no_answer(tmp_path: Path) -> None:
    install(tmp_path, "llava_text", {"libggml-text.so": b"no library"})
    install(tmp_path, "llava_none", {})
    code = "import pyllava; m = pyllava.Llava(); print(m.ask('examples/scene.png', 'How many shapes are there?'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "4"
    lines = run.stderr.splitlines()
    assert [line for line in lines if line.startswith("llava_none 1.0 is not used: it holds no back end")]
    assert [
        line
        for line in lines
        if line.startswith("llava_text 1.0 is not used: ") and "libggml-text.so" in line
    ]
    assert len([line for line in lines if "is not used" in line]) == 2


def fails(code: str, library: Path) -> str:
    """What a process with this library says when it ends with an exception."""
    environment = {**os.environ, "PYLLAVA_LIBRARY": str(library)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    return run.stderr


def test_a_library_that_does_not_load_is_an_import_error_that_names_it(tmp_path: Path) -> None:
    library = tmp_path / "libpyllava.so"
    library.write_bytes(b"no library")
    said = fails("import pyllava; pyllava.Llava", library)
    assert said.splitlines()[-1].startswith(f"ImportError: {library}: ")


def test_a_library_without_its_cpu_back_end_is_an_error(tmp_path: Path) -> None:
    if not _plugins.beside(Path(_lib.lib._name)):
        pytest.skip("this library was built without PYLLAVA_PLUGINS")
    for file in Path(_lib.lib._name).parent.glob("libpyllava*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content, text in (
        (None, "no back end of the CPU (libggml-cpu*) lies beside it"),
        (b"no library", "file too short"),
    ):
        if content is not None:
            (tmp_path / "libggml-cpu-x64.so").write_bytes(content)
        said = fails("import pyllava; pyllava.Llava()", tmp_path / "libpyllava.so")
        assert said.splitlines()[-1].startswith(f"pyllava.errors.DeviceError: {tmp_path}")
        assert said.strip().endswith(text)


BACK_END = """
#include <stdio.h>
static void note(const char * what) { FILE * f = fopen(NOTES, "a"); fputs(what, f); fclose(f); }
__attribute__((constructor)) static void opened(void) { note("opened\\n"); }
__attribute__((destructor)) static void closed(void) { note("closed\\n"); }
int ggml_backend_score(void) { return SCORE; }
void * ggml_backend_init(void) { note("used\\n"); return 0; }
"""


def test_the_file_that_is_used_is_opened_once(tmp_path: Path) -> None:
    """CUDA's runtime, held by PyTorch, keeps what a file has told it when it was opened: closed and opened again, it hangs."""
    compiler = shutil.which("cc")
    if not _plugins.beside(Path(_lib.lib._name)) or not compiler or sys.platform == "win32":
        pytest.skip("needs a library with PYLLAVA_PLUGINS and a compiler")
    files = {score: tmp_path / f"libggml-score{score}.so" for score in (1, 3, 2)}
    for score, file in files.items():
        notes = f'-DNOTES="{tmp_path / str(score)}"'
        command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", str(file), f"-DSCORE={score}", notes]
        subprocess.run(command, input=BACK_END, text=True, check=True)
    code = f"import pyllava; from pyllava import _lib; _lib.load._load_plugin({[str(file) for file in files.values()]}); "
    code += f"print(open({str(tmp_path / '3')!r}).read().split())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["['opened',", "'used']"]
    for score in (1, 2):
        assert (tmp_path / str(score)).read_text().split() == ["opened", "closed"]
