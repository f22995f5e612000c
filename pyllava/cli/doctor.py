"""``pyllava-cli doctor``: what is installed here, and whether it works, on one page for a report of a fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._plain import plain
from .._terminal import say
from .options import PROGRAM, Parser

_DESCRIPTION = """\
Show what is installed here and have the demo model answer three questions. Exit code 1: the library cannot be loaded, or an answer is
wrong; the rest of the page is there all the same.
"""


def doctor(argv: Sequence[str]) -> None:
    """Print the page; SystemExit(1) if something on it is wrong."""
    from .._doctor import PRIVACY, is_sound, report

    parser = Parser(prog=f"{PROGRAM} doctor", description=_DESCRIPTION, epilog=PRIVACY)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse(argv)
    page = report()
    print(json.dumps(page, indent=2) if options.json else "\n".join([PRIVACY, *_lines(page)]))
    sys.stdout.flush()
    wrong = [f"{name}: {section['error']}" for name, section in page.items() if "error" in section]
    for text in wrong:
        say(f"{PROGRAM}: error: {plain(text)}")
    if not is_sound(page):
        raise SystemExit(1)


def _lines(page: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, section in page.items():
        yield f"\n{name.replace('_', ' ')}"
        for key, value in section.items():
            shown = [value] if not isinstance(value, list) else value or ["none"]
            label = plain(f"  {key}=" if name == "environment" else f"  {key.replace('_', ' ')}: ")
            yield f"{label}{_text(shown[0])}" if len(shown) == 1 else label
            yield from (f"    {_text(each)}" for each in shown if len(shown) > 1)


def _text(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, dict):
        shown = {key: _mib(each) if key.startswith("memory_") else _text(each) for key, each in value.items()}
        return ", ".join(f"{key.replace('_', ' ')}: {text}" for key, text in shown.items())
    return plain({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"
