"""What the commands that ask a model share on the terminal: notes, bars and the library's log, all on stderr."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._progress import StageBars

DEMO_NOTE = "this is the demo model of pyllava: it knows drawn scenes and nothing else; -m names a real model"


@dataclass
class Console:
    """What goes to stderr besides errors: nothing with --log-disable, bars only on a terminal."""

    quiet: bool
    bars: StageBars | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty():
            from ._progress import StageBars

            self.bars = StageBars()

    def note(self, text: str) -> None:
        if not self.quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """A line that is shown even with --log-disable."""
        if self.bars is not None:
            self.bars.close()
        say(text)

    def note_inert(self, options: argparse.Namespace) -> None:
        names = ("top_k", "top_p", "min_p", "seed")
        inert = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
        if inert and options.temp <= 0:
            given = ", ".join(inert)
            self.note(f"{given}: no effect without --temp above 0, the answer is the likeliest one")


@contextlib.contextmanager
def library_log(options: argparse.Namespace) -> Iterator[None]:
    """The library's log on stderr while this lasts: warnings, all of it with -v, nothing with --log-disable."""
    logger = logging.getLogger("pyllava")
    handler: logging.Handler = logging.NullHandler() if options.log_disable else logging.StreamHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def say(text: str, end: str = "\n") -> None:
    stream: IO[str] | None = sys.stderr
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # a full or closed stderr must not cost the answer
            print(text, end=end, file=stream, flush=True)


def printable(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{printable(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
