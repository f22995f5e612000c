#!/usr/bin/env python3
"""Writes the repository's address into a checkout from which a release is built; the workflow knows it, the sources do not.

    python packaging/addresses.py https://github.com/OWNER/NAME v1.2.3

README.md, the package's description, gets absolute links and pictures of that tag, pyproject.toml its [project.urls].
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?![a-z]+:|#)([^()\s]+)\)")
_URLS = (
    "\n[project.urls]\nRepository = {0!r}\nIssues = '{0}/issues'\nChangelog = '{0}/blob/{1}/CHANGELOG.md'\n"
)


def main(repository: str, tag: str, root: Path = Path()) -> None:
    readme, project = root / "README.md", root / "pyproject.toml"
    settings = project.read_text(encoding="utf-8")
    if "[project.urls]" in settings:
        sys.exit(f"{project}: has [project.urls] already, need a fresh checkout")
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), repository, tag), encoding="utf-8")
    project.write_text(settings + _URLS.format(repository, tag), encoding="utf-8")


def absolute(text: str, repository: str, tag: str) -> str:
    """`text` with relative links as addresses of a repository at a tag; pictures as files, the rest as pages."""

    def link(found: re.Match[str]) -> str:
        mark, label, path = found.groups()
        return f"{mark}{label}({repository}/{'raw' if mark else 'blob'}/{tag}/{path})"

    return _LINK.sub(link, text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1].rstrip("/"), sys.argv[2])
