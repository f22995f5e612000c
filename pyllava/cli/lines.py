"""Lines that a person types or a pipe brings; editing, history and completion where the standard library has readline.

The prompt is for people only, and never on a stdout that is a file or a pipe.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TextIO

from .._terminal import say
from .._text_file import check_start

_KEPT_LINES = 1000
_BETWEEN_WORDS = " \t\n/"


class Lines:
    """The messages on stdin; `complete` gives what a line that was begun may become."""

    def __init__(self, complete: Callable[[str], list[str]]) -> None:
        self.interactive = _is_terminal(sys.stdin, 0)
        if hasattr(sys.stdin, "reconfigure"):
            with contextlib.suppress(OSError):  # somebody has read from it
                sys.stdin.reconfigure(errors="surrogateescape")  # names of files may be any bytes
        self._has_begun = self._is_marked = False
        self._complete = complete
        self._candidates: list[str] = []
        self._readline = _readline() if self.interactive else None
        if self._readline is not None:
            self._readline.set_completer(self._candidate)
            self._readline.set_completer_delims(_BETWEEN_WORDS)
            self._history = _History(self._readline)

    def message(self, prompt: str, more: str) -> str | None:
        r"""The next message, None at the end; a line that ends in ``\`` goes on in the next, asked for with `more`.

        Ctrl-C gives "" if something was typed, and KeyboardInterrupt otherwise.
        """
        lines: list[str] = []
        try:
            while (line := self._line(more if lines else prompt)) is not None:
                lines.append(line.removesuffix("\\"))
                if lines[-1] == line:
                    break
        except KeyboardInterrupt:
            if not self.interactive or not (lines or self._typed()):
                raise
            say("")
            return ""
        return "\n".join(lines) if lines else None

    def _line(self, prompt: str) -> str | None:
        if not self.interactive:
            return self._piped() if sys.stdin is not None else None
        try:
            line = self._ask(prompt)
        except EOFError:
            say("")
            return None
        if self._readline is not None:
            self._history.keep()
        return line

    def _piped(self) -> str | None:
        """A line of a pipe or a file, which another system may have written."""
        line = sys.stdin.readline()
        if not self._has_begun:
            self._has_begun = True
            data = _bytes(line)
            check_start(data, _name_of_stdin())
            self._is_marked = data.startswith(codecs.BOM_UTF8)
        if self._is_marked:  # UTF-8 whatever the locale
            line = _bytes(line).decode("utf-8-sig", "surrogateescape")
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def _ask(self, prompt: str) -> str:
        """input(), which edits only if it finds a terminal at stdout; with another stdout, that of stderr is lent to it."""
        if _is_terminal(sys.stdout, 1):
            return input(prompt)
        if self._readline is not None and _is_terminal(sys.stderr, 2) and _descriptor(sys.stdout) == 1:
            with _stderr_as_stdout():
                return input(prompt)
        say(prompt, end="")
        return input()

    def _typed(self) -> str:
        """What stood on the line when Ctrl-C came, where one can know."""
        return "" if self._readline is None else str(self._readline.get_line_buffer())

    def _candidate(self, text: str, number: int) -> str | None:
        """What readline asks for: the candidates one by one, without what stands before `text`."""
        assert self._readline is not None
        if number == 0:
            begin, end = self._readline.get_begidx(), self._readline.get_endidx()
            whole = self._complete(self._readline.get_line_buffer()[:end])
            self._candidates = [line[begin:] for line in whole]
        return self._candidates[number] if number < len(self._candidates) else None


class _History:
    """The lines of this and earlier conversations in a file; where that cannot be, of this one only."""

    def __init__(self, readline: ModuleType) -> None:
        self._readline = readline
        self._path: str | None = history_path()
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            os.close(os.open(self._path, os.O_RDONLY | os.O_CREAT, 0o600))  # what one asks is private
            readline.read_history_file(self._path)
        except OSError:
            self._path = None
        readline.set_history_length(_KEPT_LINES)
        self._n_kept = readline.get_current_history_length()

    def keep(self) -> None:
        """Writes what is new, at once: a terminal may be closed at any time."""
        n_lines = self._readline.get_current_history_length()
        if self._path is None or n_lines == self._n_kept:
            return
        try:
            if hasattr(self._readline, "append_history_file"):  # not in every build
                self._readline.append_history_file(n_lines - self._n_kept, self._path)
            else:
                self._readline.write_history_file(self._path)
        except OSError:
            self._path = None
        self._n_kept = n_lines


def history_path() -> str:
    """Where the lines typed are kept: below $XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # empty or relative means unset, says the XDG specification
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "pyllava", "history")


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    return readline


@contextlib.contextmanager
def _stderr_as_stdout() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _bytes(line: str) -> bytes:
    """What a line of stdin was before it was decoded."""
    return line.encode(getattr(sys.stdin, "encoding", None) or "utf-8", "surrogateescape")


def _name_of_stdin() -> str:
    """The file's name, where stdin is one and the system tells."""
    try:
        if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
            return os.readlink(f"/proc/self/fd/{sys.stdin.fileno()}")
    except (OSError, ValueError):
        pass
    return "stdin"


def _is_terminal(stream: TextIO | None, descriptor: int) -> bool:
    return _descriptor(stream) == descriptor and os.isatty(descriptor)


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):  # a StringIO, a closed file
        return None
