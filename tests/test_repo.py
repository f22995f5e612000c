"""House rules that can be checked by reading the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pyllava import _lib
from pyllava.convert import families
from pyllava.convert.projector_file import RULES

ROOT = Path(__file__).parent.parent
C_FILES = sorted(
    path for glob in ("csrc/**/*.[ch]", "csrc/**/*.cpp", "ggml/kernels/*.[ch]") for path in ROOT.glob(glob)
)
HEADER = (ROOT / "csrc" / "pyllava.h").read_text()
DECLARED = re.findall(r"PYLLAVA_API\s+[\w\s*]+?\b(pyllava_\w+)\(", HEADER)

# The layers of docs/architecture.md are the folders of csrc/: a file may include its own folder and those of lower
# rank. Only networks, and what runs them, call the kernels, which know nothing of csrc/.
LAYERS = {"base": 1, "machine": 2, "files": 3, "net": 4, "text": 4, "run": 5, "csrc": 6}
USE_KERNELS = {"net", "run"}

# Files of the kernels: one may include those of lower rank.
RANKS = {
    "kernels": 4,
    "tile": 5,
    "micro": 5,
    "simd_x86": 5,
    "simd_avx512": 6,
    "simd_avx2": 6,
    "simd_plain": 6,
    "micro_code": 6,
    **{f"micro_{part}": 5 for part in ("round", "columns", "panels", "direct", "dots", "attention")},
    **{f"micro_{name}": 7 for name in ("plain", "avx2", "avxvnni", "avx512", "avx512vnni")},
    "simd_neon": 6,
    "micro_neon": 7,
    "micro_neondot": 7,
    "micro_neoni8mm": 7,
    "cpu": 6,  # micro.h, for the tables
    "fast_linear": 6,
    "gelu": 6,
    "linear": 6,
    "attention": 6,
    "rope": 6,
    "fast_attention": 6,
    "shared_code": 7,
    **{f"shared_{name}": 8 for name in ("plain", "avx2", "avx512")},
    "shared": 8,
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


# Python's layers. What of the package a folder may import as it is loaded, besides its own files, and what
# its functions may import besides.
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.glob("pyllava/**/*.py"))
}
BINDING, COMMANDS, CONVERTERS, BULK = "pyllava._lib", "pyllava.cli", "pyllava.convert", "pyllava.bulk"
CLUSTERS = "pyllava.ray"
TABLES = {"errors", "formats", "_mixes", "_part_file", "_terminal", "templates", "_template_choice"}
FILES = {"_named_pictures", "_part_file", "_picture_heads", "_sources", "_text_file"}
MAY_IMPORT = {
    BINDING: {"pyllava._leaving", "pyllava._plain", "pyllava._plugins", "pyllava.errors"},
    f"{CONVERTERS}.checkpoints": {f"{CONVERTERS}.errors"},
    CONVERTERS: {f"pyllava.{name}" for name in TABLES},
    BULK: {f"pyllava.{name}" for name in (*FILES, "answer", "errors", "images")},  # no model, no command line
}
MAY_IMPORT_LATER = {
    CONVERTERS: {"pyllava", "pyllava.errors", "pyllava.quantize"},
    BULK: {"pyllava.llava"},  # the name of a type
}
FOR_NOBODY_BUT = {
    COMMANDS: {"pyllava.__main__"},
    CONVERTERS: {f"{COMMANDS}.convert"},
    BULK: {f"{COMMANDS}.caption", f"{COMMANDS}.caption_ray", CLUSTERS},
    CLUSTERS: {f"{COMMANDS}.caption_ray"},
}


def parts_of(module: str, wanted: tuple[str, ...]) -> bool:
    return module.startswith(tuple(f"{name}." for name in wanted)) or module in wanted


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that are carried out as the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            yield from imports(node)


def modules(name: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    """What an import of the module `name` loads, with all dots."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = name.split(".") if PACKAGE[name].stem == "__init__" else name.split(".")[:-1]
    start = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*start, *([node.module] if node.module else [])])
    inside = {f"{source}.{alias.name}" for alias in node.names} & set(PACKAGE)
    return inside or {source}


def loaded(name: str) -> set[str]:
    tree = ast.parse(PACKAGE[name].read_text())
    return set().union(*(modules(name, node) for node in imports(tree)))


def loaded_later(name: str) -> set[str]:
    nodes = ast.walk(ast.parse(PACKAGE[name].read_text()))
    found = [modules(name, node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return set().union(*found) - loaded(name)


@pytest.mark.parametrize("name", PACKAGE)
def test_imports_point_down(name: str) -> None:
    folder = name if PACKAGE[name].stem == "__init__" else name.rpartition(".")[0]
    ours = {module for module in loaded(name) if parts_of(module, ("pyllava",))}
    later = {module for module in loaded_later(name) if parts_of(module, ("pyllava",))}
    wants_ctypes = [module for module in loaded(name) | loaded_later(name) if parts_of(module, ("ctypes",))]
    assert not wants_ctypes or parts_of(name, (BINDING,))
    if folder in MAY_IMPORT:
        own = {module for module in PACKAGE if parts_of(module, (folder,))}
        assert ours <= own | MAY_IMPORT[folder]
        assert later <= own | MAY_IMPORT[folder] | MAY_IMPORT_LATER.get(folder, set())
    for wanted, users in FOR_NOBODY_BUT.items():
        if not parts_of(name, (wanted, *users)):
            assert not [module for module in ours | later if parts_of(module, (wanted,))]


def test_modules_import_each_other_in_an_order() -> None:
    ours = {name: loaded(name) & set(PACKAGE) - {"pyllava", name} for name in PACKAGE}
    TopologicalSorter(ours).prepare()  # a circle raises CycleError


# The engine's last words where no guard catches them: it ends the process right after.
PRINTS = {"guard.cpp": ["fprintf("]}


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_c_code_never_prints_exits_or_aborts(path: Path) -> None:
    code = re.sub(r'//.*|"(\\.|[^"\\])*"', "", path.read_text())
    found = re.findall(r"\b(?:abort|exit|_exit|printf|fprintf|puts|putchar|assert|GGML_ASSERT)\s*\(", code)
    assert found == PRINTS.get(path.name, [])


def included(path: Path) -> list[Path]:
    """The headers of ours that a file includes, but for its own."""
    ours = {header.stem: header for header in C_FILES if header.suffix == ".h"}
    found = re.findall(r'#include [<"](\w+)\.h[>"]', path.read_text())
    return [ours[name] for name in found if name in ours and name != path.stem]


def rank(path: Path) -> int:
    return 0 if path.name == "pyllava.h" else LAYERS[path.parent.name]


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_includes_point_down(path: Path) -> None:
    folder = path.parent.name
    for header in included(path):
        if folder == "kernels":
            down = header.parent == path.parent and RANKS[header.stem] < RANKS[path.stem]
        elif header.parent.name == "kernels":
            down = folder in USE_KERNELS
        else:
            down = header.parent == path.parent or rank(header) < rank(path)
        assert down, f"{path.name} includes {header.name}"


def test_headers_include_each_other_in_an_order() -> None:
    headers = [path for path in C_FILES if path.suffix == ".h"]
    TopologicalSorter({path: included(path) for path in headers}).prepare()  # a circle raises CycleError


def test_names_of_c_files_are_unique() -> None:
    names = [path.name for path in C_FILES]
    assert len(names) == len(set(names))  # all folders are searched for an include


GLOBALS = {
    "static _Thread_local char last_error[PYLLAVA_ERROR_MAX];",  # error.c: pyllava_last_error() of the thread
    "std::atomic<bool> failed { false };",  # guard.cpp: a back end that gave up stays so until the process ends
    "thread_local int depth = 0;",  # guard.cpp: the engine calls back with a text and nothing else
}


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.name)
def test_no_global_mutable_state(path: Path) -> None:
    for line in re.sub(r" *//.*", "", path.read_text()).splitlines():
        declared = re.match(r"[a-zA-Z_][\w:<>* ]*\b\w+(\[[^]]*\])*( = .*| \{.*\})?[;{]$", line)
        if declared and not line.startswith(("typedef", "struct", "union", "enum", "do", "using")):
            assert "const" in line or line in GLOBALS, line


def test_c_lines_are_not_too_long() -> None:
    for path in [*C_FILES, *ROOT.glob("tests/c/*.c")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"


def test_messages_say_what_they_mean_in_words() -> None:
    for path in [*C_FILES, *PACKAGE.values()]:
        found = re.findall(r'"[^"\n]* \[[A-Z][A-Z0-9_-]+\]"', path.read_text())
        assert not [text for text in found if "INST" not in text], path.name  # which is a template's


def test_families_are_named_in_their_files_alone() -> None:
    """What runs a model, and what reads its numbers, knows none of them by name."""
    for path in C_FILES:
        if path.parent.name in ("run", "files", "csrc"):
            assert not re.search(
                r"\b(llama|qwen2|granite)_|\b(LLAMA|QWEN2|GRANITE)\b", re.sub(r"//.*", "", path.read_text())
            ), path.name
        found = re.findall(r'"(llama|qwen2|granite)\.', path.read_text())
        assert set(found) <= {path.stem}, path.name


# What the loader knows and the converter never writes: of other converters.
READ_ONLY = {"rope_freqs.weight", "v.image_newline"}


def asked_names() -> set[str]:
    """Names of tensors that the loader asks for, `%d` for the number of a layer."""
    asked = set()
    for path in ROOT.glob("csrc/net/*.c"):
        text = path.read_text()
        for name in re.findall(r'\bweights_(?:vector|matrix|table|unfolded|has)\([^"]*"([^"]+)"', text):
            asked.update(
                [name.replace("%s", end) for end in ("ffn_up", "ffn_down")] if "v.blk" in name else [name]
            )
        asked.update(f"blk.%d.{name}.bias" for name in re.findall(r'= optional_bias\([^"]*"([^"]+)"', text))
        asked.update(re.findall(r'[?:] "([^"]+)"', text))  # one of two names
    return {name for name in asked if "." in name and "%s" not in name}


def test_converter_and_loader_agree_on_tensor_names() -> None:
    ends = [*families.META_ENDS.values(), families.OUTPUT, *families.CLIP.ends.values()]
    ends += [rule for rules in RULES.values() for rule in rules]
    blocks = [*families.META_BLOCK.values()]
    for family in families.FAMILIES:
        ends += family.ends.values()
        blocks += family.block.values()
    written = {re.sub(r"mb_block\.\d", "mb_block.%d", rule.name) for rule in ends} | {"model.image_newline"}
    written |= {f"blk.%d.{rule.name}" for rule in blocks}
    written |= {f"v.blk.%d.{rule.name}" for rule in families.CLIP.block.values()}
    assert asked_names() - READ_ONLY == written


def test_no_merge_is_left_half_done() -> None:
    for folder in ("csrc", "ggml/kernels", "pyllava", "tests", "docs", "bench", "examples", "."):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            if path.suffix in {".py", ".c", ".h", ".md", ".toml"}:
                assert not re.search(r"^(<{7}|>{7}) ", path.read_text(errors="replace"), re.MULTILINE), path


def test_the_repository_speaks_of_the_project_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        "|".join(["/work" + "/", "/root" + "/", "py" + "pi.org", "help" + "er session", "sub" + "agent"])
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".c", ".h", ".md", ".toml", ".txt", ".cmake", ".yml", ".cff", ""}
            and path.is_file()
        ):
            assert not forbidden.search(path.read_text(errors="replace")), name
