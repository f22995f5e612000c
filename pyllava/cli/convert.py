"""``pyllava-cli convert``: the converters' one-step command."""

from __future__ import annotations

from ..convert import convert_llava
from .options import PROGRAM


def convert(argv: list[str]) -> None:
    """Convert the checkpoint that the command line names. Raises SystemExit with the exit code where that is not 0."""
    code = convert_llava.main(argv, prog=f"{PROGRAM} convert")
    if code:
        raise SystemExit(code)
