"""What the converters' scripts share: how they run. stdout carries only the paths of the files written."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from .. import _terminal
from .errors import ConvertError

LOGGER = "pyllava.convert"
log = logging.getLogger(LOGGER)


def run(prog: str, body: Callable[[], None], *, verbose: bool = False) -> int:
    """Run `body`; returns the exit code. Every failure is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")

    def logged() -> None:
        with _terminal.log_lines(LOGGER, logging.DEBUG if verbose else logging.INFO):
            try:
                body()
            except ImportError as error:
                missing = error.name or "a package"
                raise ConvertError(f"the converters need {missing}: pip install 'pyllava[convert]'") from None

    return _terminal.run(prog, logged, interrupted=f"{prog}: error: interrupted")
