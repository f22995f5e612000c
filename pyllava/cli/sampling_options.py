"""The options of ``pyllava-cli`` that say how tokens are chosen: llama.cpp's, same names."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..templates import unescape
from .option_kinds import (
    COUNT_OR_0,
    FROM_MINUS_1,
    INTEGER,
    POSITIVE,
    REAL,
    REAL_OR_0,
    SHARE,
    adder,
    changed,
    number,
)

_RANDOM_SEEDS = (-1, 0xFFFFFFFF)
_LETTERS = {  # of --sampling-seq, in the order that stages have unless told otherwise
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
    "a": "adaptive_p",
}
_OTHER_NAMES = {
    **dict.fromkeys(("typical", "typical_p", "typ"), "typ_p"),
    "nucleus": "top_p",
    "temp": "temperature",
}
_BIAS = re.compile(r"(.+?)([+-](?:inf|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?))", re.DOTALL | re.IGNORECASE)


def _names(text: str) -> list[str]:
    """``top_k;temperature``"""
    found = []
    for word in filter(None, (word.strip() for word in text.split(";"))):
        name = word.replace("-", "_")
        found.append(_OTHER_NAMES.get(name, name))
        if found[-1] not in _LETTERS.values():
            need = ", ".join(_LETTERS.values())
            raise argparse.ArgumentTypeError(f"{word!r}, need names with semicolons between them: {need}")
    return found


def _letters(text: str) -> list[str]:
    """``kt``"""
    for letter in text:
        if letter not in _LETTERS:
            need = ", ".join(f"{letter} {name}" for letter, name in _LETTERS.items())
            raise argparse.ArgumentTypeError(f"{letter!r}, need letters of: {need}")
    return [_LETTERS[letter] for letter in text]


def _bias(text: str) -> tuple[int | str, float]:
    """``15043+1``, ``15043-inf``, or a text in the place of the id."""
    if not (found := _BIAS.fullmatch(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r}, need a token's id or a text, + or -, and a number or inf"
        )
    token, bias = found.groups()
    return int(token) if token.isdecimal() else token, float(bias)


class _Biases(argparse.Action):
    """One dict of all of them; those of one token add up."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        biases, (token, bias) = dict(getattr(namespace, self.dest) or {}), value
        biases[token] = biases.get(token, 0.0) + bias
        setattr(namespace, self.dest, biases)


class _Texts(argparse.Action):
    """One list of all of them, as people write them."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), unescape(value)])


class _Breakers(argparse.Action):
    """One list of all of them instead of the usual ones; ``none`` adds nothing to it."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, before if value == "none" else [*before, unescape(value)])


def add_sampling(options: argparse.ArgumentParser) -> None:
    """Options with the names that ``Llava.ask`` has for them (`dest`); None: as it is there."""
    _add_chance(options)
    _add_repetition(options)
    _add_order(options)


def _add_chance(options: argparse.ArgumentParser) -> None:
    add = adder(options, "sampling: what may come next")
    add(
        "--temp",
        "T",
        "temperature (default: 0, always the likeliest token; 0.1 is a good value)",
        dest="temperature",
        type=changed(REAL, lambda value: max(value, 0.0)),
    )
    add(
        "--top-k",
        "N",
        "sample from the N likeliest tokens (default: 0, all)",
        type=changed(INTEGER, lambda n: max(n, 0)),
    )
    add("--top-p", "P", "sample from the likeliest tokens that sum to P (default: 1, all)", type=SHARE)
    add("--min-p", "P", "drop tokens less likely than P times the likeliest (default: 0, none)", type=SHARE)
    add(
        "--typical --typical-p",
        "P",
        "sample from the tokens whose surprise is nearest to the mean, that sum to P (default: 1, all)",
        dest="typical_p",
        type=SHARE,
    )
    add(
        "--top-nsigma --top-n-sigma",
        "N",
        "drop logits more than N standard deviations below the largest (default: -1, none)",
        dest="top_n_sigma",
        type=REAL,
    )
    add("--xtc-probability", "P", "how often to exclude the top choices (default: 0, never)", type=SHARE)
    add("--xtc-threshold", "P", "what makes a token one of them (default: 0.1; above 0.5: off)", type=SHARE)
    add("--dynatemp-range", "R", "temperature from T-R to T+R, by entropy (default: 0)", type=REAL_OR_0)
    add(
        "--dynatemp-exp",
        "X",
        "exponent of the entropy (default: 1)",
        dest="dynatemp_exponent",
        type=REAL_OR_0,
    )
    add(
        "--mirostat",
        "V",
        "hold the surprise of tokens: 1 or 2, its version (default: 0, off); of the others only --temp acts then",
        type=number(int, "0, 1 or 2", lambda value: 0 <= value <= 2),
    )
    add("--mirostat-ent", "N", "bits of surprise (default: 5)", dest="mirostat_tau", type=REAL_OR_0)
    add("--mirostat-lr", "N", "rate of learning (default: 0.1)", dest="mirostat_eta", type=REAL_OR_0)
    add(
        "--adaptive-target",
        "P",
        "prefer tokens that are about so likely (default: -1, off)",
        type=number(float, "a number of at most 1", lambda value: value <= 1),
    )
    add(
        "--adaptive-decay",
        "N",
        "of the memory of how likely they were (default: 0.9)",
        type=number(float, "a number in 0..0.99", lambda value: 0 <= value <= 0.99),
    )


def _add_repetition(options: argparse.ArgumentParser) -> None:
    add = adder(options, "sampling: against repetition in the answer")
    add("--repeat-penalty", "X", "make tokens less likely to recur (default: 1, off)", type=POSITIVE)
    add("--presence-penalty", "X", "the same, by subtraction (default: 0, off)", type=REAL)
    add("--frequency-penalty", "X", "the same, for each time that a token came (default: 0, off)", type=REAL)
    add("--repeat-last-n", "N", "tokens these look back on (default: 64; -1: all)", type=FROM_MINUS_1)
    add(
        "--dry-multiplier",
        "X",
        "make tokens that go on with a repeat of n tokens less likely, by X * base^(n - length) (default: 0, off)",
        type=REAL_OR_0,
    )
    add(
        "--dry-base",
        "X",
        "(default: 1.75)",
        type=number(float, "a number of at least 1", lambda value: value >= 1),
    )
    add("--dry-allowed-length", "N", "shorter repeats are fine (default: 2)", type=COUNT_OR_0)
    add("--dry-penalty-last-n", "N", "tokens it looks back on (default: 64; -1: all)", type=FROM_MINUS_1)
    add(
        "--dry-sequence-breaker",
        "TEXT",
        r'ends what can be repeated; repeatable, none for none (default: \n, :, " and *)',
        dest="dry_sequence_breakers",
        action=_Breakers,
    )


def _add_order(options: argparse.ArgumentParser) -> None:
    add = adder(options, "sampling: tokens, order and seed")
    add(
        "-l --logit-bias",
        "TOKEN(+/-)N",
        "make a token (its id, or a text) more or less likely: 15043+1, 15043-inf; repeatable",
        type=_bias,
        action=_Biases,
    )
    add(
        "-r --stop --reverse-prompt",
        "TEXT",
        "ends the answer, and is no part of it; repeatable",
        dest="stop",
        action=_Texts,
    )
    add("--ignore-eos", None, "never end the answer before -n tokens", default=None)
    order = ";".join(_LETTERS.values())
    add(
        "--samplers",
        "NAMES",
        f"what acts, in this order; what is missing is off (default: {order})",
        type=_names,
    )
    add(
        "--sampling-seq --sampler-seq",
        "LETTERS",
        f"the same in letters (default: {''.join(_LETTERS)})",
        dest="samplers",
        type=_letters,
    )
    add(
        "-s --seed",
        "N",
        "seed of the sampler (default: -1, random)",
        type=changed(INTEGER, lambda seed: None if seed in _RANDOM_SEEDS else seed),
    )
