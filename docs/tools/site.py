"""What mkdocs does besides rendering the pages of docs/ (hooks, named in mkdocs.yml).

Pages and pictures of other folders join the site under their path in the repository, so that a link that works in a
checkout works on the site. A link to a file that is no page leads to the repository, where its address is known, and
else becomes plain text. The lists of commands and of Python names are made here, from parsers and docstrings.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parents[1])]  # for `tools`: mkdocs loads this file by its path

from tools import api, commands  # noqa: E402

ELSEWHERE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "bench/RESULTS.md",
    "bench/*.svg",
    "bench/gpu/README.md",
    "examples/*.png",
    "examples/demo_model/README.md",
    "examples/plugins/*/README.md",
    "ggml/README.md",
)
GENERATED = {"commands": commands.page, "api": api.page}

_PLACE = re.compile(r"^<!-- the site puts (\w+) here -->$", re.MULTILINE)
_FENCED = re.compile(r"^(```.*?^```\s*?$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config: Any) -> Any:
    """A page of docs/ that `nav` does not name is a how-to."""
    listed = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    [how_to] = [part["How to"] for part in config.nav if "How to" in part]
    how_to += sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in listed)
    return config


def on_files(files: Files, config: Any) -> Files:
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links as the site needs them; examples of code stay as they are."""
    at = page.file.src_uri
    parts = _FENCED.split(markdown)
    parts[::2] = [
        _LINK.sub(lambda found: _link(found, at, config.repo_url, files), part) for part in parts[::2]
    ]
    return _PLACE.sub(lambda found: GENERATED[found[1]](), "".join(parts))


def _link(found: re.Match[str], at: str, repository: str | None, files: Files) -> str:
    mark, text, target = found.groups()
    path, hash, anchor = target.partition("#")
    if not path or ":" in path:
        return found[0]
    here = at if not (ROOT / "docs" / at).exists() else f"docs/{at}"
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    for name in (wanted.removeprefix("docs/"), f"{wanted}/README.md"):
        if files.get_file_from_path(name):
            return f"{mark}[{text}]({posixpath.relpath(name, posixpath.dirname(at) or '.')}{hash}{anchor})"
    if not (ROOT / wanted).exists() or mark:
        return found[0]  # mkdocs reports it
    return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{wanted}{hash}{anchor})" if repository else text
