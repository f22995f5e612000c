"""The project's own files: links between pages, the description of the package, what is said of the version."""

from __future__ import annotations

import re
import subprocess
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


def test_the_description_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    monkeypatch.chdir(ROOT)
    import long_description

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    described = long_description.dynamic_metadata("readme", {"repository": ""})
    assert described == {"content-type": "text/markdown", "text": readme}
    text = long_description.dynamic_metadata("readme", {"repository": "https://example.org/x/"})["text"]
    assert not LINK.findall(without_code(text))
    assert "](https://example.org/x/raw/HEAD/examples/scene.png)" in text
    assert "](https://example.org/x/blob/HEAD/CONTRIBUTING.md)" in text
    with pytest.raises(ValueError, match="need readme"):
        long_description.dynamic_metadata("version", {"repository": ""})


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
