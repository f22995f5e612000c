"""Writes csrc/text/unicode_ranges.c: the letters, numbers, spaces and punctuation that tokenizers tell apart.

python packaging/unicode_ranges.py > csrc/text/unicode_ranges.c

The classes are those of the regular expressions of the package `tokenizers` (pip install tokenizers), which is
what models were trained with; so is their version of Unicode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby

from tokenizers import Regex, normalizers

CLASSES = {"LETTER": r"\p{L}", "NUMBER": r"\p{N}", "SPACE": r"\s", "PUNCTUATION": r"\p{P}"}
FIRST_LETTERS = {  # a letter that each version of Unicode was the first to have
    "13.0": 0x10E80,
    "14.0": 0x0870,
    "15.0": 0x11F04,
    "15.1": 0x2EBF0,
    "16.0": 0x105C0,
    "17.0": 0x323B0,
}


def code_points() -> list[int]:
    return [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def members(expression: str) -> set[int]:
    """The code points that a regular expression for one character matches."""
    text = "".join(map(chr, code_points()))
    left = normalizers.Replace(Regex(expression), "").normalize_str(text)
    return set(code_points()) - set(map(ord, left))


def classes() -> dict[int, str]:
    """The class of each code point that has one."""
    return {code: name for name, expression in CLASSES.items() for code in members(expression)}


def ranges(found: dict[int, str]) -> Iterator[tuple[int, int, str]]:
    """First and last code point, and class, in order."""
    for (name, _), group in groupby(
        enumerate(sorted(found)), lambda pair: (found[pair[1]], pair[1] - pair[0])
    ):
        codes = [code for _, code in group]
        yield codes[0], codes[-1], name


def version(letters: set[int]) -> str:
    return max(
        (name for name, code in FIRST_LETTERS.items() if code in letters), key=list(FIRST_LETTERS).index
    )


def main() -> int:
    found = classes()
    letters = {code for code, name in found.items() if name == "LETTER"}
    rows = [f"{{ 0x{first:X}, 0x{last:X}, CHAR_{name} }}," for first, last, name in ranges(found)]
    print(f"// unicode_ranges.c - Unicode {version(letters)}, written by packaging/unicode_ranges.py.")
    print('#include "unicode_classes.h"\n')
    print("// clang-format off: a table")
    print("const unicode_range UNICODE_RANGES[] = {")
    for at in range(0, len(rows), 2):
        print("    " + " ".join(rows[at : at + 2]))
    print("};\n\nconst uint8_t ASCII_CLASSES[128] = {")
    for at in range(0, 128, 4):
        names = [found.get(code) for code in range(at, at + 4)]
        print("    " + " ".join(f"CHAR_{name or 'OTHER'}," for name in names))
    print("};\n// clang-format on\n")
    print("const int32_t N_UNICODE_RANGES = sizeof UNICODE_RANGES / sizeof *UNICODE_RANGES;")
    return 0


if __name__ == "__main__":
    sys.exit(main())
