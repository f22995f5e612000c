"""What the scripts share at the terminal: one-line errors, exit codes, log lines and progress on stderr.

Exit codes: 0 done, 1 the conversion failed, 2 wrong usage, 130 Ctrl-C. stdout carries only the paths of the
files written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from .errors import ConvertError

log = logging.getLogger("pyllava.convert")

Tick = Callable[[int], object]  # called with the number of bytes just handled


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(prog: str, body: Callable[[], None], *, verbose: bool = False) -> int:
    """Run `body`; returns the exit code. Every failure is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
    try:
        body()
        return 0
    except KeyboardInterrupt:
        _fail(prog, "interrupted")
        return 130
    except ImportError as error:
        missing = error.name or "a package"
        _fail(prog, f"the converters need {missing}: pip install 'pyllava[convert]'")
    except (ConvertError, OSError, MemoryError) as error:
        _fail(prog, _text(error))
    finally:
        log.removeHandler(handler)
    return 1


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(prog: str, text: str) -> None:
    print(f"{prog}: error: {' '.join(text.split())}", file=sys.stderr)


@contextlib.contextmanager
def progress(label: str, n_bytes: int) -> Iterator[Tick]:
    """A bar over `n_bytes` on stderr where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    with tqdm(total=n_bytes, desc=label, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
