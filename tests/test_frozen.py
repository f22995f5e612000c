"""Programs frozen by PyInstaller: what its hook brings along, and a real one where PyInstaller is installed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pyllava
from pyllava import _lib, _pyinstaller
from pyllava.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
HOOK = Path(_pyinstaller.__file__).parent / "hook-pyllava.py"
PROGRAM = """
import sys
from pyllava import cli
if __name__ == "__main__":
    raise SystemExit(cli.main(sys.argv[1:]))
"""


def test_pyinstaller_is_told_where_the_hook_is() -> None:
    assert [Path(folder) / HOOK.name for folder in _pyinstaller.get_hook_dirs()] == [HOOK]
    assert HOOK.is_file()
    group = re.search(
        r"\[project.entry-points.pyinstaller40\]\n(.*)\n", (ROOT / "pyproject.toml").read_text()
    )
    assert group is not None
    assert group[1] == 'hook-dirs = "pyllava._pyinstaller:get_hook_dirs"'


def test_the_hook_names_what_only_strings_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = types.ModuleType("PyInstaller.utils.hooks")
    asked = []

    def collect_submodules(package: str, filter: object) -> list[str]:
        assert callable(filter)
        names = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("pyllava/**/*.py")
        ]
        return [name.removesuffix(".__init__") for name in names if filter(name)]

    def collect_data_files(package: str, includes: list[str]) -> list[tuple[str, str]]:
        asked.extend(includes)
        return []

    hooks.collect_submodules, hooks.collect_data_files = collect_submodules, collect_data_files  # type: ignore[attr-defined]
    hooks.copy_metadata = lambda package: [(package, "metadata")]  # type: ignore[attr-defined]
    for name in ("PyInstaller", "PyInstaller.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", hooks)
    found = runpy.run_path(str(HOOK))
    assert {target.partition(":")[0] for target in COMMANDS.values()} <= set(found["hiddenimports"])
    assert {"pyllava.llava", "pyllava._lib.load", "pyllava._progress"} <= set(found["hiddenimports"])
    assert asked == ["models/*"]
    assert all(folder == "pyllava/lib" for _, folder in found["binaries"])


@pytest.mark.slow
def test_a_frozen_program_answers(tmp_path: Path) -> None:
    """`pyinstaller app.py`, as it is, of a package that is installed; and the program runs without Python."""
    pytest.importorskip("PyInstaller")
    site = tmp_path / "site"
    package = site / "pyllava"
    package.parent.mkdir()
    shutil.copytree(ROOT / "pyllava", package)
    (package / "lib").mkdir(exist_ok=True)
    library = Path(_lib.load.lib._name)
    (package / "lib" / f"libpyllava{library.suffix}").write_bytes(library.read_bytes())
    info = site / f"pyllava-{pyllava.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pyllava\nVersion: {pyllava.__version__}\n")
    (info / "entry_points.txt").write_text(
        "[pyinstaller40]\nhook-dirs = pyllava._pyinstaller:get_hook_dirs\n"
    )
    (tmp_path / "app.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "PYLLAVA_LIBRARY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", "app.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    program = str(tmp_path / "dist" / "app" / "app")
    asking = [program, "--image", str(ROOT / "examples" / "scene.png"), "-p", "What is in the picture?"]
    done = subprocess.run(asking, capture_output=True, text=True, env={"HOME": "/"}, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert "orange square" in done.stdout
