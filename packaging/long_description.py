"""The package's description for an index: README.md, its links and pictures absolute once the repository has an address.

A provider of scikit-build-core (`[tool.scikit-build.metadata.readme]` in pyproject.toml).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?![a-z]+:|#)([^()\s]+)\)")


def dynamic_metadata(field: str, settings: Mapping[str, Any]) -> dict[str, str]:
    if field != "readme":
        raise ValueError(f"found the field {field!r}, need readme")
    text = Path("README.md").read_text(encoding="utf-8")
    return {"content-type": "text/markdown", "text": absolute(text, settings["repository"])}


def absolute(text: str, repository: str) -> str:
    """`text` with its relative links under the address `repository`; as it is where that is "" (not known yet)."""
    if not repository:
        return text

    def link(found: re.Match[str]) -> str:
        mark, label, path = found.groups()
        return f"{mark}{label}({repository.rstrip('/')}/{'raw' if mark else 'blob'}/HEAD/{path})"

    return re.sub(_LINK, link, text)
