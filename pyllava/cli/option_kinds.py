"""What the options of ``pyllava-cli`` are made of: groups of them, and the kinds of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def adder(options: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    group = options.add_argument_group(title)

    def add(names: str, value: str | None, help: str, **how: Any) -> None:
        if value is None:
            how.setdefault("action", "store_true")
        else:
            how["metavar"] = value
        group.add_argument(*names.split(), help=help, **how)

    return add


def number(kind: Callable[[str], float], need: str, accept: Callable[[float], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}, need {need}") from None
        if not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r}, need {need}")
        return value

    return parse


def changed(parse: Callable[[str], Any], change: Callable[[Any], Any]) -> Callable[[str], Any]:
    """What llama.cpp's tools take for something else than the number itself."""
    return lambda text: change(parse(text))


INTEGER = number(int, "an integer", lambda value: True)
COUNT = number(int, "an integer of at least 1", lambda value: value >= 1)
COUNT_OR_0 = number(int, "an integer of at least 0", lambda value: value >= 0)
COUNT_OR_LESS = number(int, "an integer of at least 1, or -1", lambda value: value >= 1 or value == -1)
FROM_MINUS_1 = number(int, "an integer of at least -1", lambda value: value >= -1)
REAL = number(float, "a number", lambda value: True)
REAL_OR_0 = number(float, "a number of at least 0", lambda value: value >= 0)
POSITIVE = number(float, "a number above 0", lambda value: value > 0)
SHARE = number(float, "a number in 0..1", lambda value: 0 <= value <= 1)
