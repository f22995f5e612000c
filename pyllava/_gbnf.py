"""Grammars in llama.cpp's GBNF, as Lark for llguidance.

llguidance cuts a text into lexemes, the longest first, which GBNF knows nothing of. So a grammar whose rules do not use
themselves becomes a single lexeme, which is a regular expression; in any other every lexeme is a single character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

_TOKEN = re.compile(
    r"""(?P<space>[\s]+|\#[^\n]*)
    |(?P<define>::=)
    |(?P<literal>"(?:[^"\\]|\\.)*")
    |(?P<class>\[(?:[^\]\\]|\\.)*\])
    |(?P<count>\{\s*\d*\s*(?:,\s*\d*\s*)?\}|[*+?])
    |(?P<name>[A-Za-z0-9_-]+)
    |(?P<mark>[().|])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def is_gbnf(text: str) -> bool:
    """Whether a grammar is GBNF, which defines its rules with ``::=``."""
    return re.search(r"(?m)^\s*[A-Za-z0-9_-]+\s*::=", text) is not None


def lark_of(text: str) -> str:
    """The same grammar in Lark. Raises ValueError, with the line, for what GBNF has not."""
    rules = dict(_rules([*_tokens(text)]))
    if "root" not in rules:
        raise ValueError("grammar: no rule root, with which GBNF begins")
    uses = {name: {token.text for token in body if token.kind == "name"} for name, body in rules.items()}
    for name, body in rules.items():
        for token in body:
            if token.kind == "name" and token.text not in rules:
                raise ValueError(
                    f"grammar, line {token.line}: rule {name} uses {token.text}, which is not defined"
                )
    is_one = not _is_recursive(uses)
    names = {name: f"{'R' if is_one else 'r'}{number}" for number, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    lines += [f"{names[name]}: {_lark(body, names, is_one=is_one)}" for name, body in rules.items()]
    return "\n".join(lines) + "\n"


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"grammar, line {line}: {text[at : at + 20]!r} is no GBNF")
        if found.lastgroup != "space":
            yield _Token(found.lastgroup or "", found[0], line)
        line += found[0].count("\n")
        at = found.end()


def _rules(tokens: list[_Token]) -> Iterator[tuple[str, list[_Token]]]:
    starts = [at - 1 for at, token in enumerate(tokens) if token.kind == "define"]
    if not starts or starts[0] != 0 or any(tokens[at].kind != "name" for at in starts):
        raise ValueError("grammar: need rules, each a name, ::= and what it stands for")
    names: set[str] = set()
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        name = tokens[start]
        if name.text in names:
            raise ValueError(f"grammar, line {name.line}: rule {name.text} is defined twice")
        names.add(name.text)
        body = tokens[start + 2 : end]
        _check(name, body)
        yield name.text, body


def _check(name: _Token, body: list[_Token]) -> None:
    """Raises ValueError where brackets or repeats stand wrong."""
    depth, before = 0, "|"
    for token in body:
        is_repeat = token.kind == "count"
        depth += {"(": 1, ")": -1}.get(token.text if token.kind == "mark" else "", 0)
        if depth < 0 or (is_repeat and before in ("(", "|")):
            raise ValueError(
                f"grammar, line {token.line}: {token.text} has nothing before it in rule {name.text}"
            )
        before = token.text if token.kind == "mark" else ""
    if depth:
        raise ValueError(f"grammar, line {name.line}: a bracket of rule {name.text} is not closed")


def _is_recursive(uses: dict[str, set[str]]) -> bool:
    """Whether a rule can come to stand for itself."""
    try:
        TopologicalSorter(uses).prepare()
    except CycleError:
        return True
    return False


def _lark(body: list[_Token], names: dict[str, str], *, is_one: bool) -> str:
    parts: list[str] = []
    before = "|"
    for token in body:
        if token.kind == "mark" and token.text in "|)" and before in ("(", "|"):
            parts.append('""')  # nothing, which GBNF does not write
        if token.kind == "name":
            parts.append(names[token.text])
        elif token.kind == "literal":
            parts.append(_literal(token.text[1:-1], is_one=is_one))
        elif token.kind == "class":
            parts.append(_class(token.text[1:-1]))
        elif token.kind == "count":
            parts[-1] = f"({parts[-1]})" if parts[-1].endswith(("*", "+", "?", "}")) else parts[-1]
            parts[-1] += _count(token)
        else:
            parts.append("/(?s:.)/" if token.text == "." else token.text)
        before = token.text if token.kind == "mark" else ""
    if before in ("(", "|"):
        parts.append('""')
    return " ".join(parts)


def _count(token: _Token) -> str:
    if token.text in "*+?":
        return token.text
    least, _, most = re.sub(r"\s", "", token.text[1:-1]).partition(",")
    if "," not in token.text:
        most = least
    return f"{{{least or 0},{most}}}"


def _literal(text: str, *, is_one: bool) -> str:
    letters = list(_characters(text))
    if is_one or len(letters) < 2:
        return (
            json.dumps("".join(letters), ensure_ascii=False)
            if not letters
            else f"/{''.join(map(_hex, letters))}/"
        )
    return "(" + " ".join(f"/{_hex(letter)}/" for letter in letters) + ")"


def _class(text: str) -> str:
    is_not, found = text.startswith("^"), ""
    for match in _ESCAPE.finditer(text[1:] if is_not else text):
        letter = _character(match)
        found += "-" if match[0] == "-" else _hex(letter)
    inner = re.sub(r"^-|-$", lambda _: _hex("-"), found)
    return f"/[{'^' if is_not else ''}{inner}]/"


def _characters(text: str) -> Iterator[str]:
    return map(_character, _ESCAPE.finditer(text))


def _character(match: re.Match[str]) -> str:
    number = match[1] or match[2] or match[3]
    if number:
        if int(number, 16) > 0x10FFFF:
            raise ValueError(f"grammar: {match[0]} is no character")
        return chr(int(number, 16))
    return _LETTERS.get(match[4], match[4]) if match[4] else match[5]


def _hex(letter: str) -> str:
    """A character in a regular expression, whatever it is."""
    return letter if letter.isascii() and letter.isalnum() else f"\\x{{{ord(letter):x}}}"
