"""The option of ``pyllava-cli`` that names the answers to choose from."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_choices(add: Callable[..., None]) -> None:
    add(
        "--choices",
        "A,B,...",
        "the answer is one of these, with commas between them",
        type=_choices,
    )


def _choices(text: str) -> list[str]:
    found = [choice.strip() for choice in text.split(",")]
    if len(found) < 2 or not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}, need two or more different answers with commas between")
    return found
