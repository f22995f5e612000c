"""``pyllava-cli completion SHELL``: a script by which bash, zsh or fish complete commands, options and their choices.

It is written from the parsers themselves; what it does not know, the shell completes as names of files.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .._terminal import parser_of
from .options import PROGRAM, Parser, ask_parser

_PROGRAMS = f"{PROGRAM} pyllava"
_INSTALL = """\
bash: add to ~/.bashrc      eval "$(pyllava-cli completion bash)"
zsh:  add to ~/.zshrc       eval "$(pyllava-cli completion zsh)"        (behind compinit)
fish: run once              pyllava-cli completion fish > ~/.config/fish/completions/pyllava-cli.fish
"""


def completion(argv: list[str]) -> None:
    """Print the script for the shell that the command line names."""
    parser = Parser(
        prog=f"{PROGRAM} completion", description="A script that completes command lines.", epilog=_INSTALL
    )
    parser.add_argument(
        "shell", metavar="SHELL", choices=tuple(_SCRIPTS), help=f"one of {', '.join(_SCRIPTS)}"
    )
    options = parser.parse(argv)
    print(_SCRIPTS[options.shell](_commands()), end="")


@dataclass(frozen=True)
class _Option:
    """An option's names, its help, and the values that it takes: None if it takes none, nothing if any."""

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...] | None

    @classmethod
    def of(cls, action: argparse.Action) -> _Option:
        values = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
        return cls(tuple(action.option_strings), action.help or "", values)


_Commands = Mapping[str, list[_Option]]
"""The options of each command; those of a question are under "". An option without names is an argument."""


def _commands() -> _Commands:
    from .main import COMMANDS, command

    found = {"": ask_parser()} | {name: _parser(name, command) for name in COMMANDS}
    return {name: list(map(_Option.of, parser._actions)) if parser else [] for name, parser in found.items()}


def _parser(
    name: str, command: Callable[[str], Callable[[list[str]], object]]
) -> argparse.ArgumentParser | None:
    try:
        return parser_of(command(name))
    except ImportError:  # what it needs is not installed
        return None


def _names(options: list[_Option]) -> str:
    return " ".join(name for option in options for name in option.names)


def _choices(commands: _Commands, separator: str) -> Iterator[tuple[str, str]]:
    """For each option with choices the patterns ``command:option`` for it, and the choices."""
    for command, options in commands.items():
        for option in options:
            if option.names and option.values:
                yield separator.join(f"{command}:{name}" for name in option.names), " ".join(option.values)


def _arguments(options: list[_Option]) -> str:
    return " ".join(value for option in options if not option.names for value in option.values or ())


def _cases(commands: _Commands, words: Callable[[list[_Option]], str], do: str) -> str:
    """Lines of a ``case``, one for each command, that `do` something with its `words`."""
    cases = ((command or '""', words(options)) for command, options in commands.items())
    return "\n".join(f"        {command}) {do.format(words)} ;;" for command, words in cases if words)


def _first_words(commands: _Commands) -> str:
    return " ".join(["help", "version", *filter(None, commands)])


def _bash(commands: _Commands) -> str:
    find = 'COMPREPLY=($(compgen -W "{}" -- "$word"))'
    choices = "\n".join(
        f"        {patterns}) {find.format(words)}; return ;;" for patterns, words in _choices(commands, "|")
    )
    return f"""\
_pyllava_cli() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=
    if [[ $word == "=" ]]; then word=; elif [[ $before == "=" ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    case ${{COMP_WORDS[1]}} in
        {"|".join(filter(None, commands))}) ((COMP_CWORD > 1)) && command=${{COMP_WORDS[1]}} ;;
    esac
    case $command:$before in
{choices}
    esac
    COMPREPLY=()
    if [[ $word == -* ]]; then case $command in
{_cases(commands, _names, find)}
    esac; elif ((COMP_CWORD == 1)); then {find.format(_first_words(commands))}
    else case $command in
{_cases(commands, _arguments, find)}
    esac; fi
}}
complete -o bashdefault -o default -F _pyllava_cli {_PROGRAMS}
"""


def _zsh(commands: _Commands) -> str:
    choices = "\n".join(
        f"        {patterns}) compadd -- {words}; return ;;" for patterns, words in _choices(commands, "|")
    )
    return f"""\
#compdef {_PROGRAMS}
_pyllava_cli() {{
    local command=
    case $words[2] in
        {"|".join(filter(None, commands))}) ((CURRENT > 2)) && command=$words[2] ;;
    esac
    case $command:$words[CURRENT-1] in
{choices}
    esac
    if [[ $words[CURRENT] == -* ]]; then case $command in
{_cases(commands, _names, "compadd -- {}")}
    esac; else
        ((CURRENT == 2)) && compadd -- {_first_words(commands)}
        case $command in
{_cases(commands, _arguments, "compadd -- {}")}
        esac
        _files
    fi
}}
compdef _pyllava_cli {_PROGRAMS}
"""


def _fish(commands: _Commands) -> str:
    lines = [f"for name in {_PROGRAMS}"]
    lines += [f"    complete -c $name -n __fish_use_subcommand -a {shlex.quote(_first_words(commands))}"]
    others = " ".join(filter(None, commands))
    for command, options in commands.items():
        seen = f"__fish_seen_subcommand_from {command or others}"
        condition = shlex.quote(seen if command else f"not {seen}")
        for option in options:
            words = [f"    complete -c $name -n {condition}"]
            words += [f"-{_fish_kind(name)} {name.lstrip('-')}" for name in option.names]
            if option.values:
                words.append(f"-{'xa' if option.names else 'a'} {shlex.quote(' '.join(option.values))}")
            elif option.values is not None:
                words.append("-r")
            if option.names or option.values:
                lines.append(" ".join([*words, "-d", _fish_text(option.help)]))
    return "\n".join([*lines, "end"]) + "\n"


def _fish_kind(name: str) -> str:
    if name.startswith("--"):
        return "l"
    return "s" if len(name) == 2 else "o"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ").replace("%%", "%") + "'"


_SCRIPTS: Mapping[str, Callable[[_Commands], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
