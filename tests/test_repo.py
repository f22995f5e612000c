"""House rules that can be checked by reading the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from pyllava import _lib

ROOT = Path(__file__).parent.parent
C_FILES = sorted([*ROOT.glob("csrc/*.[ch]"), *ROOT.glob("ggml/kernels/*.[ch]")])
HEADER = (ROOT / "csrc" / "pyllava.h").read_text()
DECLARED = re.findall(r"PYLLAVA_API\s+[\w\s*]+?\b(pyllava_\w+)\(", HEADER)

# The layers of docs/architecture.md: a file may include files of lower rank only.
RANKS = {
    "pyllava": 0,
    "error": 1,
    "log": 2,
    "guard": 2,
    "memory": 2,
    "plugins": 3,
    "thread": 2,
    "cores": 3,
    "pool": 3,
    "file": 3,
    "gguf": 4,
    "quantize": 4,
    "kernels": 4,
    "tile": 5,
    "micro": 5,
    "simd_x86": 5,
    "simd_avx512": 6,
    "simd_avx2": 6,
    "simd_plain": 6,
    "micro_code": 6,
    **{f"micro_{part}": 5 for part in ("round", "panels", "direct", "dots", "attention")},
    **{f"micro_{name}": 7 for name in ("plain", "avx2", "avxvnni", "avx512", "avx512vnni")},
    "simd_neon": 6,
    "micro_neon": 7,
    "micro_neondot": 7,
    "micro_neoni8mm": 7,
    "cpu": 6,
    "fast_linear": 6,
    "linear": 6,
    "attention": 6,
    "rope": 6,
    "exact_code": 7,
    **{f"exact_{name}": 8 for name in ("plain", "avx2", "avx512")},
    "exact": 8,
    "hparams": 5,
    "devices": 4,
    "placement": 6,
    "weights": 6,
    "vocab": 6,
    "nn": 7,
    "kv_cache": 6,
    "tokenizer_spm": 7,
    "vit": 8,
    "projector": 8,
    "merge": 8,
    "llama": 8,
    "model": 9,
    "candidates": 2,
    "sampler_stages": 3,
    "sampler": 4,
    "engine": 8,
    "session": 10,
    "api": 11,
}


def test_binding_is_the_header_in_its_order() -> None:
    assert list(_lib.FUNCTIONS) == DECLARED


def test_binding_has_the_header_s_argument_counts() -> None:
    text = re.sub(r"//.*", "", HEADER)
    for name, (_, arguments) in _lib.FUNCTIONS.items():
        inside = re.search(rf"\b{name}\((.*?)\);", text, re.DOTALL)
        assert inside is not None
        n = 0 if inside[1].strip() == "void" else inside[1].count(",") + 1
        assert n == len(arguments), name


def test_exported_symbols_are_the_header_s() -> None:
    library = _lib.lib._name
    try:
        output = subprocess.run(
            ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    exported = {line.split()[-1].split("@")[0] for line in output.splitlines()}
    assert exported == set(DECLARED)


def test_only_the_binding_imports_ctypes() -> None:
    for path in ROOT.glob("pyllava/*.py"):
        imported = {
            name.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert "ctypes" not in imported or path.name == "_lib.py", path


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_c_code_never_prints_exits_or_aborts(path: Path) -> None:
    code = re.sub(r'//.*|"(\\.|[^"\\])*"', "", path.read_text())
    found = re.findall(r"\b(?:abort|exit|_exit|printf|fprintf|puts|putchar|assert|GGML_ASSERT)\s*\(", code)
    assert not found


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_includes_point_down(path: Path) -> None:
    for included in re.findall(r'#include [<"](\w+)\.h[>"]', path.read_text()):
        if included in RANKS and included != path.stem:
            assert RANKS[included] < RANKS[path.stem], f"{path.name} includes {included}.h"


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_no_global_mutable_state(path: Path) -> None:
    for line in path.read_text().splitlines():
        declared = re.match(r"[a-zA-Z_][\w* ]*\b\w+(\[[^]]*\])*( = .*)?[;{]$", line)
        if declared and not line.startswith(("typedef", "struct", "union", "enum", "do")):
            assert "const" in line or line == "static _Thread_local char last_error[PYLLAVA_ERROR_MAX];", line


def test_c_lines_are_not_too_long() -> None:
    for path in C_FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"


def test_converter_and_loader_agree_on_tensor_names() -> None:
    specification = "".join(
        (ROOT / "csrc" / name).read_text() for name in ("vit.c", "projector.c", "merge.c", "llama.c")
    )
    converter = "".join(path.read_text() for path in ROOT.glob("convert/*.py"))
    for name in (
        "token_embd",
        "output_norm",
        "attn_norm",
        "attn_output",
        "ffn_gate",
        "ffn_norm",
        "v.class_embd",
        "image_newline",
    ):
        assert name in specification, name
        assert name.removeprefix("v.") in converter, name


def test_the_repository_speaks_of_the_project_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        "|".join(["/work" + "/", "/root" + "/", "py" + "pi.org", "help" + "er session", "sub" + "agent"])
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".c", ".h", ".md", ".toml", ".txt", ".cmake", ""} and path.is_file():
            assert not forbidden.search(path.read_text(errors="replace")), name
