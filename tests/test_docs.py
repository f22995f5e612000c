"""The documentation: every example runs and prints what its page says, and the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

ROOT = pages.ROOT
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "demo_model" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WITH_EXAMPLES = [page for page in PAGES if pages.examples(page)]


@pytest.mark.skipif(sys.platform == "win32", reason="the examples are for a POSIX shell")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_examples_run_and_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    folder = pages.workplace(tmp_path)
    found = pages.examples(page)
    for example in (example for example in found if example.language == "sh"):
        code = pages.runnable(example.code)
        done = pages.run_shell(code, folder)
        pages.check(done, f"{page.name}:{example.line}\n{code}")
        assert example.printed in (None, done.stdout), f"{page.name}:{example.line}"
    python = [example for example in found if example.language == "python"]
    printed = pages.run_python([(f"{page.name}:{item.line}", item.code) for item in python], folder)
    for example, text in zip(python, printed, strict=True):
        assert example.printed in (None, text), f"{page.name}:{example.line}"


def test_each_exception_from_that_is_used() -> None:
    commands = [
        line
        for page in PAGES
        for example in pages.examples(page)
        if example.language == "sh"
        for line in re.sub(r"\\\n\s*", "", example.code).splitlines()
    ]
    for begin in pages.NOT_HERE:
        assert any(re.match(begin, line) for line in commands), begin


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


@pytest.mark.usefixtures("tools")
def test_the_page_of_commands_has_every_option() -> None:
    from tools import commands

    from pyllava.cli.main import COMMANDS

    page = f"\n{commands.page()}"
    parsers = commands.parsers()
    assert {f"pyllava-cli {name}" for name in COMMANDS} < {parser.prog for parser in parsers}
    for parser in parsers:
        section = page.partition(f"\n### {parser.prog}\n")[2].partition("\n### ")[0]
        for action in parser._actions:
            assert all(f"`{name}`" in section for name in action.option_strings), parser.prog


@pytest.mark.usefixtures("tools")
def test_the_pictures_are_of_this_version() -> None:
    """python docs/tools/pictures.py draws them again."""
    from tools import pictures

    for name, draw in (("terminal.svg", pictures.terminal), ("speed.svg", pictures.speed)):
        assert draw() == (pictures.FOLDER / name).read_text(encoding="utf-8")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site needs pip install 'pyllava[docs]'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs pip install 'pyllava[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}/"' in home, f"nothing leads to {page.name}"
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="pyllava.Llava.ask"' in reference
    assert "--image-max-tiles" in (tmp_path / "commands" / "index.html").read_text(encoding="utf-8")
