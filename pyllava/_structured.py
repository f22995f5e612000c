"""Structured answers: what a schema, an expression, a list or a grammar allows, through llguidance.

A grammar is compiled once and kept; every answer gets a copy of its matcher (`_constraint`). Hostile ones are refused for
their size or their depth, which llguidance does not bound, and given up after a second on a thread of their own.
"""

from __future__ import annotations

import importlib
import json
import math
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import _lib
from ._closing import STEPS, Ends, GrammarEnds, RegularEnds
from ._constraint import Constraint, Vocabulary, read, reason_of
from ._gbnf import is_gbnf, lark_of
from ._lib.values import number_text
from .errors import PyllavaError
from .sampling import STRUCTURES, Sampling

_SECONDS = 0.8  # for compiling, on a thread that may be left
_SHORT = 1 << 12  # letters of an expression that is compiled again to find the end of an answer
_MOST_BYTES = 1 << 18  # of a schema or grammar
_MOST_LEVELS = 1000  # that a schema's references, or a grammar's rules, may nest
_KEPT = 16  # compiled grammars
_SCHEMAS = frozenset(
    ["items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties", "not", "if", "then", "else"]
)
_NAMED = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_JOINED = frozenset(
    ["$ref", "anyOf", "oneOf", "allOf", "if"]
)  # beside properties: those of several schemas are one object's
_OPEN = frozenset(["additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties"])
_BOUNDS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
_COMPARED = _BOUNDS | {"const", "enum"}
_EXACT = 1 << 53
_ENDS = (-(2**63), 2**63 - 1)  # of 64 bits: as bounds they hold whatever they are rounded to
_GUARD = "\x01"  # no vocabulary has a token of it and others


@dataclass(frozen=True)
class Wanted:
    """What an answer is to be: a grammar in llguidance's terms, and what is made of the text."""

    kind: str
    body: dict[str, Any]
    """``{"json_schema": ...}`` or ``{"lark_grammar": ...}``"""
    parse: Callable[[str], Any]
    regex: str | None = None
    """The same as a regular expression between slashes, where it is one."""

    def grammar(self, space: str) -> str:
        """As llguidance takes it. `space`: what the answer may begin with besides."""
        if not space:
            return json.dumps({"grammars": [self.body]})
        start = {"lark_grammar": f"start: {json.dumps(space)}? @body"}
        return json.dumps({"grammars": [start, {**self.body, "name": "body"}]})


def wanted(sampling: Sampling) -> Wanted | None:
    """What the options ask for; None: any text. Raises ValueError for what is no schema, or too large a one."""
    kind = next((kind for kind in STRUCTURES if getattr(sampling, kind) is not None), None)
    if kind is None:
        return None
    given = getattr(sampling, kind)
    if kind == "schema":
        return _of_schema(given)
    if kind == "choices":
        return _of_regex(kind, _regex_of_choices(given))
    text = _checked(kind, given)
    if kind == "regex":
        return _of_regex(kind, _slashed(text))
    lark = lark_of(text) if is_gbnf(text) else text
    lines = lark.splitlines()
    n = sum(":" in line for line in lines)
    n += lark.count("{") if "%json" in lark else 0  # schemas, whose references are not looked for
    _check_levels("grammar", n, 1 + max(map(_depth, lines), default=0))
    return Wanted(kind, {"lark_grammar": lark}, str)


def _checked(kind: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{kind}: found {type(text).__name__}, need a text")
    size = len(text.encode(errors="surrogatepass"))
    if size > _MOST_BYTES:
        raise ValueError(f"{kind}: {size} bytes, need {_MOST_BYTES} at most")
    return text


def _check_levels(kind: str, n: int, depth: int) -> None:
    if n * depth > _MOST_LEVELS:
        raise ValueError(
            f"{kind}: {n} rules or references, each nested up to {depth} deep, need {_MOST_LEVELS} levels in all at most"
        )


def _depth(line: str) -> int:
    """How deep brackets are nested in a line, those in quotes too."""
    depth = deepest = 0
    for letter in line:
        if letter in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in ")]}":
            depth -= 1
    return deepest


def _of_regex(kind: str, regex: str) -> Wanted:
    return Wanted(kind, {"lark_grammar": f"start: /{regex}/"}, str, regex)


def _regex_of_choices(choices: Sequence[str]) -> str:
    for choice in choices:
        if not choice:
            raise ValueError(f"choices: found {choice!r}, need texts that are not empty")
    _checked("choices", "".join(choices))
    if not choices:
        raise ValueError("choices: found none, need one at least")
    return "|".join(_escaped(choice) for choice in dict.fromkeys(choices))


def _escaped(text: str) -> str:
    """A text as a regular expression."""
    return "".join(c if c.isalnum() or c in " _" else f"\\x{{{ord(c):x}}}" for c in text)


def _slashed(regex: str) -> str:
    """A regular expression between slashes."""
    found, at = "", 0
    while at < len(regex):
        step = 2 if regex[at] == "\\" else 1
        part = regex[at : at + step]
        found += {"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(part, part)
        at += step
    return found


# --- JSON schemas ---


def _of_schema(given: Any) -> Wanted:
    if hasattr(given, "model_json_schema") and hasattr(given, "model_validate_json"):
        schema = given.model_json_schema()
        return Wanted("schema", {"json_schema": _told(schema)}, lambda text: _instance(given, text))
    if isinstance(given, str):
        given = _read_schema(given)
    if given is True:
        given = {}
    if not isinstance(given, dict):
        raise TypeError(
            f"schema: found {type(given).__name__}, need a JSON schema as a dict or a text, True for any JSON, "
            "or a pydantic model"
        )
    return Wanted("schema", {"json_schema": _told(given)}, _value)


def _read_schema(text: str) -> Any:
    _checked("schema", text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"schema: no JSON: {error}") from None
    except RecursionError:
        raise ValueError("schema: nested too deeply") from None
    if found is not True and not isinstance(found, dict):
        raise ValueError(f"schema: {text.strip():.80}, need a JSON object, or true for any JSON")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
        raise PyllavaError(f"schema: Python does not read the answer: {text:.200}: {error}") from error


def _instance(model: Any, text: str) -> Any:
    try:
        return model.model_validate_json(text)
    except ValueError as error:
        raise PyllavaError(
            f"schema: {model.__name__} refuses what its JSON schema allows: {text:.200}: {' '.join(str(error).split())}"
        ) from error


def _told(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema, measured, with what is told to llguidance: no free white space, nothing ignored."""
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise ValueError("schema: nested too deeply, or within itself") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema: no JSON: {error}") from None
    _checked("schema", text)
    told: dict[str, Any] = json.loads(text)
    parts = [*_parts(told)]
    references = set(re.findall(r'"\$ref": ("(?:[^"\\]|\\.)*")', text))  # wherever they stand
    _check_levels("schema", 1 + len(references), _depth(text))
    is_joined = any("allOf" in part or ("properties" in part and part.keys() & _JOINED) for part in parts)
    for part in parts:
        _check_numbers(part)
        if "properties" in part and not is_joined and not part.keys() & _OPEN:
            part["additionalProperties"] = False
        if isinstance(part.get("oneOf"), list) and "anyOf" not in part and _are_apart(part["oneOf"], told):
            part["anyOf"] = part.pop("oneOf")
    asked = told.get("x-guidance")
    told["x-guidance"] = {
        "whitespace_flexible": False,
        **(asked if isinstance(asked, dict) else {}),
        "lenient": False,
        "coerce_one_of": False,
    }
    return told


def _check_numbers(part: dict[str, Any]) -> None:
    """Those that a schema compares with: llguidance computes in doubles, and would allow another number silently."""
    for name in _COMPARED & part.keys():
        todo = [part[name]]
        while todo:
            value = todo.pop()
            if isinstance(value, dict | list):
                todo += value.values() if isinstance(value, dict) else value
            elif (
                isinstance(value, int | float)
                and _EXACT < abs(value) < math.inf
                and not (name in _BOUNDS and value in _ENDS)
            ):
                raise ValueError(
                    f"schema: {name}: found {number_text(value)}, need numbers within +-2**53: a longer one is a text"
                )


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those within it, but for what are values."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            for name, value in part.items():
                if name in _SCHEMAS:
                    todo += value if isinstance(value, list) else [value]
                elif name in _NAMED and isinstance(value, dict):
                    todo += value.values()


def _are_apart(choices: list[Any], schema: dict[str, Any]) -> bool:
    """Whether no value can be of two of the schemas, by constants that each has: "one of" is "any of" then."""
    constants = [_constants(choice, schema) for choice in choices]
    names = set.intersection(*map(set, constants)) if constants else set()
    for name in names:
        values = [value for each in constants for value in each[name]]
        if len(set(values)) == len(values):
            return True
    return False


def _constants(choice: Any, schema: dict[str, Any]) -> dict[str, set[str]]:
    """The values that a schema allows, under "", and those of the properties that it requires."""
    if isinstance(choice, dict) and str(choice.get("$ref", "")).startswith("#/"):
        for name in choice["$ref"][2:].split("/"):
            schema = schema.get(name, {}) if isinstance(schema, dict) else {}
        choice = schema
    if not isinstance(choice, dict):
        return {}
    found = {"": choice}
    if choice.get("type") == "object" and isinstance(choice.get("properties"), dict):
        required = choice.get("required")
        required = required if isinstance(required, list) else []
        found |= {f".{name}": each for name, each in choice["properties"].items() if name in required}
    values = {}
    for name, each in found.items():
        if isinstance(each, dict) and ("const" in each or isinstance(each.get("enum"), list)):
            values[name] = set(map(_as_json, [each["const"]] if "const" in each else each["enum"]))
    return values


def _as_json(value: Any) -> str:
    """A value as JSON; 1.0 is 1 there."""
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


# --- compiled grammars of a model ---


@dataclass(frozen=True)
class _Compiled:
    """Matchers at the beginning, over tokens and over bytes, and a way to the end."""

    matcher: Any
    letters: Any
    ends: Ends
    closing: bytes | None
    space: str
    """What may stand before the text, and is no part of it."""


class Structures:
    """Compiled grammars for the vocabulary of one model; from any thread."""

    def __init__(self, model: _lib.ModelHandle) -> None:
        self._model = model
        self._tokenizers: tuple[Vocabulary, Any, Any] | None = None
        self._compiled: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()

    def constraint(self, want: Wanted, start: str, space: str) -> Constraint:
        """For an answer that begins with `start`, or may begin with `space`, which is then no part of it."""
        guidance = _llguidance()
        if self._tokenizers is None:
            self._tokenizers = _tokenizers(self._model, guidance)
        vocabulary, tokens, letters = self._tokenizers
        found = self._compile(guidance, want, "" if start else space, tokens, letters)
        matcher, by_letter, closing = found.matcher.deep_copy(), found.letters.deep_copy(), found.closing
        begun = start.encode()
        if start:
            ids = tokens.tokenize_bytes(begun)
            if matcher.try_consume_tokens(ids) != len(ids):
                raise ValueError(f"start_with: {start!r:.80} is no beginning of what {want.kind} allows")
            read(by_letter, begun)
            closing = found.ends.first(by_letter, begun)[0]
        return Constraint(vocabulary, matcher, by_letter, found.ends, closing, start=begun, space=found.space)

    def _compile(self, guidance: Any, want: Wanted, space: str, tokens: Any, letters: Any) -> _Compiled:
        key = want.grammar(""), space
        found = self._compiled.get(key)
        if found is None:
            found = _within(_SECONDS, want.kind, lambda: _compiled(guidance, want, space, tokens, letters))
            self._compiled[key] = found
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return found


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise PyllavaError(
            "schema, regex, choices and grammar need llguidance: pip install 'pyllava[structured]'"
        ) from None


def _compiled(guidance: Any, want: Wanted, space: str, tokens: Any, letters: Any) -> _Compiled:
    limits = guidance.LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_grammar_size=60_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )

    def matcher_of(tokenizer: Any, grammar: str) -> Any:
        return guidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)

    def tried(tokenizer: Any, grammar: str) -> Any:
        matcher = matcher_of(tokenizer, grammar)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()
            trial.compute_ff_tokens()
        if trial.is_error() or (trial.is_stopped() and not trial.is_accepting()):
            raise ValueError(f"{want.kind}: {reason_of(trial) or 'no text satisfies it'}")
        return matcher

    def shorter(n: int) -> Any:
        regex = f"({re.escape(space)})?({want.regex})" if space else want.regex
        lark = f"start: SHORT\nSHORT: /{regex}/ & /(?s:.{{0,{n}}})/"
        return matcher_of(letters, guidance.LLMatcher.grammar_from_lark(lark))

    by_letter = tried(letters, want.grammar(""))
    begun = [*space.encode()]
    if by_letter.validate_tokens(begun) == len(begun):
        space = ""  # whose it is could not be told
    else:
        by_letter = tried(letters, want.grammar(space))
    matcher = tried(tokens, want.grammar(space))
    ends = RegularEnds(shorter) if want.regex is not None and len(want.regex) <= _SHORT else GrammarEnds()
    closing, is_certain = ends.first(by_letter, b"", 2 * STEPS)
    if closing is None and is_certain:
        raise ValueError(f"{want.kind}: no text satisfies it")
    return _Compiled(matcher, by_letter, ends, closing, space)


def _within(seconds: float, kind: str, make: Callable[[], _Compiled]) -> _Compiled:
    """What is made within some seconds, else ValueError; then it is left to its end, unseen."""
    done: queue.SimpleQueue[_Compiled | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(make())
        except BaseException as error:  # a panic of Rust is no Exception
            done.put(error)

    threading.Thread(target=work, name="pyllava-grammar", daemon=True).start()
    try:
        found = done.get(timeout=seconds)
    except queue.Empty:
        raise ValueError(f"{kind}: takes more than {seconds} s to compile: make it smaller") from None
    if isinstance(found, _Compiled):
        return found
    if isinstance(found, ValueError | MemoryError):
        raise found
    raise ValueError(f"{kind}: {' '.join(str(found).split()):.300}")


# --- vocabularies ---


class _Words:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(
        self, tokens: list[bytes], ends: list[int], bos: int, encode: Callable[[bytes], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = ends
        self.eos_token_id = ends[0]
        self.bos_token_id = None if bos < 0 else bos
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)


def _tokenizers(model: _lib.ModelHandle, guidance: Any) -> tuple[Vocabulary, Any, Any]:
    """The vocabulary, llguidance's tokenizer for it, and one for single bytes."""
    n = model.info.n_vocab
    pieces, ends = model.pieces(), model.ends()
    words = [*pieces]
    for token in ends:
        words[token] = model.piece(token, with_special=True) or b"<end>"

    def encode(text: bytes) -> list[int]:
        return _ids(model, pieces, text) or list(tokens.greedy_tokenize(text.decode()))

    tokens = guidance.LLTokenizer(_Words(words, ends, model.info.bos_id, encode), eos_token=ends)
    single = [bytes([byte]) for byte in range(256)]
    letters = guidance.LLTokenizer(_Words([*single, b"<end>"], [256], -1, list), eos_token=[256])
    vocabulary = Vocabulary(
        model, pieces, (n + 31) // 32, ends[0], lambda text: list(tokens.tokenize_bytes(text))
    )
    return vocabulary, tokens, letters


def _ids(model: _lib.ModelHandle, pieces: list[bytes], text: bytes) -> list[int]:
    """The model's tokens of a text within an answer; [] where they would be those of another text.

    A SentencePiece vocabulary puts a space before a text: something stands before it that no token joins.
    """
    guard = _GUARD if model.info.space_prefix else ""
    given = guard + text.decode()
    ids = model.tokenize(given, plain=[(0, len(given.encode()))])
    ids = ids[len(model.tokenize(guard, plain=[(0, len(guard))])) if guard else 0 :]
    return ids if b"".join(pieces[token] for token in ids) == text else []
