"""The project's own files: links between pages, the description of the package, what is said of the version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyllava

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?![a-z]+:|#)([^()\s#]+)(?:#[^()\s]*)?\)")


def pages() -> list[Path]:
    """The Markdown files of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def test_links_between_files_lead_somewhere() -> None:
    found = [(page, path) for page in pages() for path in LINK.findall(without_code(page.read_text("utf-8")))]
    assert len(found) > 50
    for page, path in found:
        assert (page.parent / path).exists(), f"{page.relative_to(ROOT)}: {path}"


def test_a_release_has_the_addresses_of_its_repository(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, ROOT / "packaging" / "addresses.py", "https://example.org/me/x/", "v1.2"]
    subprocess.run(command, cwd=tmp_path, check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not LINK.findall(without_code(text))
    assert "](https://example.org/me/x/raw/v1.2/examples/scene.png)" in text
    assert "](https://example.org/me/x/blob/v1.2/CONTRIBUTING.md)" in text
    settings = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert settings.endswith("""
[project.urls]
Repository = 'https://example.org/me/x'
Issues = 'https://example.org/me/x/issues'
Changelog = 'https://example.org/me/x/blob/v1.2/CHANGELOG.md'
""")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {pyllava.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_what_a_container_is_built_from() -> None:
    """The build's context leaves out most of the repository, but none of what the build names."""
    folder = ROOT / "packaging" / "container"
    kept = re.findall(r"^!(.+)$", (folder / "Containerfile.dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in kept)
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    needed = set(re.findall(r"add_subdirectory\((\w+)\)", cmake)) | set(
        re.findall(r"(?<![/\w])(\w+)/[*\w]+\.c\b", cmake)
    )
    assert {"ggml", "csrc"} <= needed <= set(kept), "CMakeLists.txt wants more"
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "pyllava"} <= set(kept)
