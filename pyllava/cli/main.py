"""``pyllava-cli``: a picture and a question in, the answer on stdout, everything else on stderr; and its commands.

Exit codes: 0 answered, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from .._terminal import did_you_mean, printable, run, say
from .ask import ask
from .mistakes import COMMAND_ADVICE, FIRST_WORDS
from .options import PROGRAM, ask_parser
from .words import is_picture, is_sentence, stands_alone

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "bench": "pyllava.cli.bench:bench",
        "caption": "pyllava.cli.caption:caption",
        "chat": "pyllava.cli.chat:chat",
        "explain": "pyllava.cli.explain:explain",
        "info": "pyllava.cli.info:info",
        "convert": "pyllava.cli.convert:convert",
        "quantize": "pyllava.cli.quantize:quantize_command",
        "view": "pyllava.cli.view:view",
        "doctor": "pyllava.cli.doctor:doctor",
        "pull": "pyllava.cli.hub:pull",
        "models": "pyllava.cli.hub:models",
        "rm": "pyllava.cli.hub:rm",
        "completion": "pyllava.cli.completion:completion",
    }
)
"""What the first word of a command line may name, and the function that runs it; without one, a question is asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _quiet_pillow(), _printable_stdout():
        return run(PROGRAM, lambda: _run_command(arguments))


_BEGIN = f"""\
{PROGRAM} answers questions about pictures. To begin:
  {PROGRAM} IMAGE "QUESTION"              asks the small demo model of the package, which knows drawn scenes
  {PROGRAM} -m MODEL IMAGE "QUESTION"     asks a LLaVA model: a GGUF file, or the folder with it and its projector
  {PROGRAM} chat -m MODEL IMAGE           has a conversation
  {PROGRAM} help                          shows all options and commands"""


def _run_command(arguments: list[str]) -> None:
    if not arguments:
        say(_BEGIN)
        raise SystemExit(2)
    first, *rest = arguments
    if first in COMMANDS:
        command(first)(rest)
    elif first in FIRST_WORDS:
        _run_command([*rest, *FIRST_WORDS[first]])
    else:
        _check_no_command(first, alone=rest in ([], ["--help"]))
        ask(arguments)


def _check_no_command(word: str, *, alone: bool) -> None:
    """Ends with a usage error where a first word was meant as a command."""
    if not stands_alone(word) or is_picture(word) or is_sentence(word):
        return
    told = COMMAND_ADVICE.get(word) or did_you_mean(word, (*COMMANDS, *FIRST_WORDS))
    if told or alone:
        what = "no such command" if told else "no such command, and no such file"
        ask_parser().error(f"{printable(word)}: {what}{told and f'; {told}'}")


def command(name: str) -> Callable[[list[str]], object]:
    """The function of a command; only its own module is imported for it."""
    module, _, function = COMMANDS[name].partition(":")
    found: Callable[[list[str]], object] = getattr(importlib.import_module(module), function)
    return found


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns about broken metadata that costs nothing here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextlib.contextmanager
def _printable_stdout() -> Iterator[None]:
    """A closed stdout swallows the answer; one of another encoding shows escapes instead of failing."""
    if sys.stdout is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding != "utf8" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    yield
