"""What is loaded when: the package, its tables and its help need neither the compiled library nor NumPy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyllava
from pyllava.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent


def run(
    code: str, *, library: str = "/nowhere/libpyllava.so", code_wanted: int = 0
) -> subprocess.CompletedProcess[str]:
    """This Python in a process whose compiled library is missing."""
    environment = {**os.environ, "PYLLAVA_LIBRARY": library}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == code_wanted, result.stderr
    return result


def test_the_import_loads_nothing_but_the_version() -> None:
    code = "import sys; before = set(sys.modules); import pyllava; print(*set(sys.modules) - before)"
    ours = {name for name in run(code).stdout.split() if name.startswith(("pyllava", "numpy", "PIL"))}
    assert ours == {"pyllava", "pyllava._version"}


def test_what_needs_no_library_is_there_without_it() -> None:
    code = (
        "import sys, pyllava\n"
        "print(issubclass(pyllava.ImageError, pyllava.PyllavaError), pyllava.templates.by_name('mpt').name)\n"
        "print('pyllava._lib' in sys.modules, 'numpy' in sys.modules)"
    )
    assert run(code).stdout == "True mpt\nFalse False\n"


@pytest.mark.parametrize("use", ["pyllava.Llava", "pyllava.devices()", "from pyllava import Answer, Chat"])
def test_a_missing_library_is_named_where_it_is_first_needed(use: str) -> None:
    last = run(f"import pyllava\n{use}", code_wanted=1).stderr.splitlines()[-1]
    wanted = "libpyllava is not built: looked in /nowhere. Run `pip install .` in the source tree"
    assert last == f"ImportError: {wanted}"


def test_a_missing_library_in_a_frozen_program() -> None:
    last = run(
        "import sys; sys.frozen = True; import pyllava; pyllava.Llava", code_wanted=1
    ).stderr.splitlines()[-1]
    assert last.startswith(
        "ImportError: libpyllava is not in this program: looked in /nowhere. Freeze it with PyInst"
    )


HEAVY = {"pyllava._lib", "ctypes", "numpy", "PIL", "tqdm"}
HELP = """
import sys
from pyllava import cli
code = cli.main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
raise SystemExit(code)
"""


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where no library is built; the names of all modules are the last line on stderr."""
    environment = {**os.environ, "PYLLAVA_LIBRARY": "/nowhere/libpyllava.so"}
    command = [sys.executable, "-c", HELP, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option: str) -> None:
    """The library, NumPy and Pillow would be most of the time that they take."""
    result = cli(option)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not HEAVY & set(result.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_is_as_light(command: str) -> None:
    result = cli(command, "--help")
    assert result.returncode == 0, result.stderr
    assert not HEAVY & set(result.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [["--image", "examples/scene.png"], ["info", "x.gguf"], ["quantize", "x", "y", "q8_0"], ["bench"]],
)
def test_the_command_line_without_the_library(arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.returncode == 1
    wanted = "libpyllava is not built: looked in /nowhere. Run `pip install .` in the source tree"
    assert result.stderr.splitlines()[-2] == f"pyllava-cli: error: {wanted}"


def test_every_public_name() -> None:
    for name in pyllava.__all__:
        assert getattr(pyllava, name) is getattr(pyllava, name)
        assert name in dir(pyllava)
    with pytest.raises(AttributeError, match="module 'pyllava' has no attribute 'Lava'"):
        _ = pyllava.Lava


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "pyllava" / "__init__.py").read_text())
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported - {"TYPE_CHECKING"} == set(pyllava.__all__)
