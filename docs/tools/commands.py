"""All commands and options, from the parsers themselves: the site puts them into docs/commands.md."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator
from unittest import mock

from pyllava.cli.main import COMMANDS, main

WITHIN = (("caption", "merge"),)
"""Commands of commands, which no table of the package lists."""


def parser_of(*words: str) -> argparse.ArgumentParser:
    """The parser that prints the help of a command: whichever is asked to."""
    asked: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(
            argparse.ArgumentParser, "print_help", lambda parser, file=None: asked.append(parser)
        ),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        main([*words, "--help"])
    if len(asked) != 1:
        raise ValueError(
            f"{' '.join(words)} --help: {len(asked)} parsers printed help, need 1: {said.getvalue()}"
        )
    return asked[0]


def parsers() -> list[argparse.ArgumentParser]:
    """The parser of a question, then those of the commands in the order of their names."""
    commands = sorted([*((name,) for name in COMMANDS), *WITHIN])
    return [parser_of(), *(parser_of(*words) for words in commands)]


def page() -> str:
    """A section for each command."""
    return "\n".join(line for parser in parsers() for line in _section(parser))


def _section(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"### {parser.prog}\n"
    # What follows a blank line keeps its layout: it is a list or a table in the terminal.
    first, _, rest = (parser.description or "").partition("\n\n")
    yield f"{_text(' '.join(first.split()))}\n"
    yield f"```text\n{parser.format_usage().strip()}\n```\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if actions:
            yield f"**{_text(group.title or '')}**\n"
            yield "| | |\n|---|---|"
            yield from (_row(parser, action) for action in actions)
            yield ""
    for text in (rest, parser.epilog or ""):
        if text.strip():
            yield f"```text\n{text.strip()}\n```\n"


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, action.metavar or action.dest) if action.nargs != 0 else ""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    what = f"{names} {_text(str(value))}".strip() if names else f"`{value}`"
    return f"| {what} | {_text(formatter._expand_help(action) if action.help else '')} |"


def _text(text: str) -> str:
    """A plain text in a cell: nothing of it is markup."""
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
