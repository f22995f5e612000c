"""What the commands share at the terminal: exit codes; errors, notes, log lines and bars on stderr.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from ._plain import plain
from .errors import PyllavaError

if TYPE_CHECKING:
    from ._progress import StageBars

DEMO_NOTE = "this is the demo model of pyllava: it knows drawn scenes and nothing else; -m names a real model"


# --- errors and exit codes ---


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line, and to which a word with one dash is one option.

    argparse takes ``-hf`` for ``-h -f``, or for -h with the value "f": help on stdout, for a script an answer.
    """

    advice: Mapping[str, str] = MappingProxyType({})
    """What to say of options of other programs that are none here."""
    synonyms: Mapping[str, str] = MappingProxyType({})
    """Other names of options."""

    def error(self, message: str) -> NoReturn:
        program, _, command = self.prog.partition(" ")
        message = message.replace("the following arguments are required:", f"{command or program} needs")
        self.exit(2, f"{program}: error: {message} ({self.prog} --help shows the options)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            words = [str(action.metavar or action.dest) for action in self._get_positional_actions()]
            self.error(f"{rest[0]!r}: too many words, need {' '.join(words) or 'options'} alone")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if _INSPECTING.get():
            raise _Inspected(self)
        words = list(sys.argv[1:] if args is None else args)
        n_options = words.index("--") if "--" in words else len(words)
        words[:n_options] = map(self._known, words[:n_options])
        return super().parse_known_args(words, namespace)

    def _known(self, word: str) -> str:
        """A word that is no option, or an option that there is; else the end, before --help is obeyed."""
        name = word.partition("=")[0]
        known = self._option_string_actions
        if name in known or not _OPTION.match(word) or (word.startswith("--") and self.allow_abbrev):
            return word
        if word in ("-help", "-version") and f"-{word}" in known:
            return f"-{word}"
        advice = self.advice.get(name.replace("_", "-")) or _similar(name, known, self.synonyms)
        self.error(f"{printable(name)}: no such option{advice and f'; {advice}'}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse lists the choices as Python writes them."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), choices, cutoff=0.6)
            text = f"{value!r}, need one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{text}; {near}" if near else text)


class _Inspected(Exception):
    """A parser, caught before it parses."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


_INSPECTING = ContextVar("_INSPECTING", default=False)


def parser_of(command: Callable[[list[str]], object]) -> Parser:
    """The parser that a command makes for its command line; nothing else of it is run."""
    token = _INSPECTING.set(True)
    try:
        command([])
    except _Inspected as found:
        return found.parser
    finally:
        _INSPECTING.reset(token)
    raise TypeError(f"{command!r}: no command, it parses nothing")


_OPTION = re.compile(r"-(?!\d+$|\d*\.\d+$)[^ ]+$")  # as argparse sees it: no number, no text with spaces
_NO_SPACE = re.compile(r"(-[a-z]+)(\d+)")  # -n5


def _similar(name: str, known: Mapping[str, object], synonyms: Mapping[str, str]) -> str:
    if (found := _NO_SPACE.fullmatch(name)) and found[1] in known:
        return f"did you mean {found[1]} {found[2]}?"
    names = {other.lstrip("-"): option for other, option in synonyms.items() if option in known}
    names |= {option.lstrip("-"): option for option in known}
    return did_you_mean(name.lstrip("-").replace("_", "-"), names, names)


def did_you_mean(
    word: str, known: Iterable[str], shown: Mapping[str, str] | None = None, *, cutoff: float = 0.7
) -> str:
    """``did you mean ...?`` with the nearest of `known`, as `shown` writes it; "" if none is near."""
    from difflib import get_close_matches

    for found in get_close_matches(word, list(known), n=1, cutoff=cutoff):
        return f"did you mean {found if shown is None else shown[found]}?"
    return ""


def run(program: str, body: Callable[[], object], *, interrupted: str = "") -> int:
    """Run the command `body` and return the exit code. Every failure is one line that begins with `program`.

    `interrupted`: the message after Ctrl-C.
    """
    try:
        body()
        _flush_stdout()
    except SystemExit as exit:  # argparse: --help, --version, a usage error
        return int(exit.code or 0)
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:  # the reader of the answer has gone: nobody to tell
        _discard_stdout()
        return 1
    except (PyllavaError, OSError, ValueError, MemoryError, ImportError) as error:  # of the library, too
        say(f"{program}: error: {one_line(error)}")
        _flush_or_discard_stdout()
        return 1
    return 0


def _flush_stdout() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _flush_or_discard_stdout() -> None:
    """Discards what cannot be written, so that the interpreter does not try again when it ends."""
    try:
        _flush_stdout()
    except (OSError, ValueError):
        _discard_stdout()


def _discard_stdout() -> None:
    """Let the interpreter's last flush of stdout succeed."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def say(text: str, end: str = "\n") -> None:
    stream: IO[str] | None = sys.stderr
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # a full or closed stderr must not cost the answer
            print(text, end=end, file=stream, flush=True)


def printable(path: Any) -> str:
    return plain(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path))


def counted(n: int, noun: str) -> str:
    """``1 caption``, ``6 captions``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def path_of(text: str) -> Path:
    """A path of a command line, below the home folder where it begins with ``~``: a shell sees only those of whole words."""
    return Path(os.path.expanduser(text))


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{printable(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return plain(" ".join(str(error).split())) or type(error).__name__


# --- notes, log lines and bars ---


@dataclass
class Console:
    """What goes to stderr besides errors: nothing with --log-disable, bars only on a terminal."""

    quiet: bool
    bars: StageBars | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.quiet:
            self.bars = stage_bars()

    def note(self, text: str) -> None:
        if not self.quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """A line that is shown even with --log-disable."""
        if self.bars is not None:
            self.bars.close()
        say(text)

    def note_inert(self, options: argparse.Namespace) -> None:
        """Tells of options that have no effect, where the answer is always the likeliest one."""
        drawn = (
            options.temperature
            or options.dynatemp_range
            or "temperature" not in (options.samplers or ["temperature"])
        )
        names = ("top_k", "top_p", "min_p", "top_n_sigma", "mirostat", "adaptive_target", "seed")
        inert = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
        if inert and not (drawn or options.typical_p or options.xtc_probability):
            given = ", ".join(inert)
            self.note(f"{given}: no effect without --temp above 0, the answer is the likeliest one")


def library_log(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """The library's log on stderr while this lasts: warnings, all with -v, nothing with --log-disable."""
    level = logging.DEBUG if options.verbose else logging.WARNING
    return log_lines("pyllava", level, shown=not options.log_disable)


@contextlib.contextmanager
def log_lines(name: str, level: int, *, shown: bool = True) -> Iterator[None]:
    """What the logger `name` says from `level` on, on stderr while this lasts; nowhere if not `shown`."""
    logger = logging.getLogger(name)
    handler: logging.Handler = logging.StreamHandler() if shown else logging.NullHandler()
    before, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate


def stage_bars() -> StageBars | None:
    """Bars for the stages of a model's work, where stderr is a terminal."""
    if not _has_terminal():
        return None
    from ._progress import StageBars

    return StageBars()


@contextlib.contextmanager
def long_stages() -> Iterator[Callable[[str, float], object]]:
    """A progress callback for work that takes minutes: bars, or a line now and then where stderr is no terminal."""
    bars = stage_bars()
    try:
        yield StageLines() if bars is None else bars
    finally:
        if bars is not None:
            bars.close()


class StageLines:
    """A progress callback that tells of a long stage every half minute, with the time that it will still take."""

    def __init__(self, every: float = 30.0) -> None:
        self._every = every
        self._stage = ""
        self._began = self._told = 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        """Say how much of `stage` is done, if that was not said a moment ago."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._told = stage, now, now
        if 0 < fraction < 1 and now - self._told >= self._every:
            self._told = now
            left = (now - self._began) * (1 - fraction) / fraction
            say(f"{stage}: {100 * fraction:.0f} %, about {duration(left)} left")


def duration(seconds: float) -> str:
    """As people read it: 2.5 s, 1:30 (minutes), 1:02:03 (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def byte_bar(label: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar over `n_bytes`, or a line now and then; what it yields takes the bytes just done."""
    if not _has_terminal():
        lines, n_done = StageLines(), 0

        def tick(n: int) -> None:
            nonlocal n_done
            n_done += n
            lines(label, n_done / n_bytes)

        yield tick
        return
    from ._progress import bar

    with bar(label, total=n_bytes, unit="B", unit_scale=True) as shown:
        yield shown.update


def _has_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
