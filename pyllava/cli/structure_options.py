"""The options of ``pyllava-cli`` that say what an answer is: JSON of a schema, one of some texts, a text of a grammar."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .._text_file import text_of
from .choice_options import add_choices
from .option_kinds import adder

if TYPE_CHECKING:
    from ..answer import Answer

_NAMES = {
    "schema": "--json-schema",
    "schema_file": "--json-schema-file",
    "grammar": "--grammar",
    "grammar_file": "--grammar-file",
    "regex": "--regex",
    "choices": "--choices",
}


def add_structure(options: argparse.ArgumentParser) -> None:
    """Options with the names that ``Llava.ask`` has for them (`dest`), or those with ``_file``."""
    add = adder(options, "structured answers (need llguidance: pip install 'pyllava[structured]')")
    add(
        "-j --json-schema", "JSON", "the answer is JSON that this schema allows ({}: any JSON)", dest="schema"
    )
    add("-jf --json-schema-file --schema", "FILE", "the same, from a file", dest="schema_file")
    add("--grammar", "TEXT", "the answer is what this grammar allows, in GBNF or Lark")
    add("--grammar-file", "FILE", "the same, from a file")
    add_choices(add)
    add("--regex", "EXPR", "the answer as a whole matches this regular expression")


def structures_given(options: argparse.Namespace) -> list[str]:
    """The names of those that were given."""
    return [name for dest, name in _NAMES.items() if getattr(options, dest, None) is not None]


def cut_short(answer: Answer) -> str:
    """Why a structured answer has no data."""
    return f"the answer ended before it was whole ({answer.finish_reason}, {len(answer.tokens)} tokens): raise -n"


def read_structures(options: argparse.Namespace) -> None:
    """Puts what the files say in the place of their names: a pipe is read once, however many answers follow."""
    for kind in ("schema", "grammar"):
        name = getattr(options, f"{kind}_file", None)
        if name is not None:
            with open(name, "rb") as file:
                setattr(options, kind, text_of(file.read(), name))
            setattr(options, f"{kind}_file", None)
