"""The names of `pyllava.__all__`, which mkdocstrings describes by their docstrings: the site puts them into docs/api.md."""

from __future__ import annotations

import pyllava
from pyllava import errors

_FIRST = ("Llava", "Chat")
_MODULES = ("quantize", "gguf", "images", "views", "templates")


def page() -> str:
    """A section for each kind of name."""
    names = [name for name in pyllava.__all__ if not name.startswith("_")]
    raised = [name for name in names if name in vars(errors)]
    values = [name for name in names if name not in (*_FIRST, *raised)]
    parts = {
        "Models and conversations": _FIRST,
        "What they take and give": values,
        "Errors": raised,
        "Modules": _MODULES,
    }
    sections = (
        f"## {title}\n\n" + "\n".join(f"::: pyllava.{name}" for name in part) for title, part in parts.items()
    )
    return "\n\n".join(sections)
