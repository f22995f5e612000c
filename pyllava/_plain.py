"""Text from a file, as it may stand in a message on somebody's terminal."""

from __future__ import annotations

import re

# Controls, which a terminal obeys (C1 too: U+009B begins a sequence as ESC [ does); line ends; marks that turn the direction
# of reading, so that what is shown is not what is there.
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` with a question mark for every character that is obeyed and not shown."""
    return _OBEYED.sub("?", text)
