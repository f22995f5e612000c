"""Completion of command lines: the scripts, run by the shells themselves where these are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllava import cli
from pyllava._terminal import parser_of
from pyllava.cli.main import COMMANDS, command
from pyllava.cli.options import ask_parser

BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(({n} - 1)); _pyllava_cli; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ : }}; _files() {{ : }}; compadd() {{ shift; print -l -- $@ }}
source {script}
words=({words}); CURRENT={n}; _pyllava_cli
"""
FISH = "source {script}; complete -C {line}"


def bash(script: Path, line: list[str]) -> str:
    words = " ".join(f"'{word}'" for word in line)
    return BASH.format(script=script, words=words, n=len(line))


def zsh(script: Path, line: list[str]) -> str:
    words = " ".join(f"'{word}'" for word in line)
    return ZSH.format(script=script, words=words, n=len(line))


def fish(script: Path, line: list[str]) -> str:
    return FISH.format(script=script, line="'" + " ".join(line) + "'")


@pytest.fixture(params=[bash, zsh, fish], ids=lambda shell: shell.__name__)
def complete(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], set[str]]:
    """What the last word of a command line may become, by the script of a shell."""
    shell = request.param
    if shutil.which(shell.__name__) is None:
        pytest.skip(f"{shell.__name__} is not installed")
    assert cli.main(["completion", shell.__name__]) == 0
    script, here = tmp_path / "script", tmp_path / "empty"
    here.mkdir()
    script.write_text(capsys.readouterr().out)

    def run(line: str) -> set[str]:
        words = line.split(" ")
        flags = {"zsh": ["-f"], "bash": ["--norc"], "fish": ["--no-config"]}[shell.__name__]
        code = shell(script, words)
        done = subprocess.run(
            [shell.__name__, *flags, "-c", code], capture_output=True, text=True, check=False, cwd=here
        )
        assert done.stderr == ""
        found = {row.split("\t")[0] for row in done.stdout.splitlines() if row}
        return {word for word in found if word.startswith(words[-1])}  # which zsh leaves to compadd

    return run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pyllava-cli ", {"help", "version", *COMMANDS}),
        ("pyllava qu", {"quantize"}),
        ("pyllava-cli --te", {"--temp", "--template", "--tensor-split"}),
        ("pyllava-cli -fa o", {"on", "off"}),
        ("pyllava-cli --image-merge f", {"flat"}),
        ("pyllava-cli chat --precision ", {"fast", "exact"}),
        ("pyllava-cli caption --existing a", {"append"}),
        ("pyllava-cli quantize --", {"--threads", "--pure", "--force", "--json", "--verbose", "--help"}),
        ("pyllava-cli quantize a.gguf b.gguf q3", {"q3_k", "q3_k_s", "q3_k_m", "q3_k_l"}),
        ("pyllava-cli completion ", {"bash", "zsh", "fish"}),
        ("pyllava-cli info --te", {"--tensors"}),
        ("pyllava-cli convert --mmproj-outtype q", {"q8_0"}),
    ],
)
def test_what_a_line_may_become(complete: Callable[[str], set[str]], line: str, expected: set[str]) -> None:
    assert complete(line) == expected


def test_every_option_is_completed(complete: Callable[[str], set[str]]) -> None:
    for prefix, parser in [
        ("", ask_parser()),
        *((f"{name} ", parser_of(command(name))) for name in COMMANDS),
    ]:
        options = {name for name in parser._option_string_actions if name.startswith("--")}
        assert complete(f"pyllava-cli {prefix}--") == options


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (([], "needs SHELL"), (["tcsh"], "'tcsh', need one of bash, zsh, fish")):
        assert cli.main(["completion", *argv]) == 2
        assert message in capsys.readouterr().err


def test_a_parser_is_taken_only_from_what_parses() -> None:
    with pytest.raises(TypeError, match="no command"):
        parser_of(print)
