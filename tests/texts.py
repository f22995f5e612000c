"""Random texts that tokenizers may stumble over."""

from __future__ import annotations

import random
from collections.abc import Iterator

import tiny

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ",
    "ABC abc 0123456789 .,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`",
    "0123456789",
    " ",
    " \t\n\r\x0b\x0c\u00a0\u2003\u3000\u2581",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
    "\u00e0\u00e9\u00ef\u00f5\u00fc\u00df\u0153\u0142\u0131\u0130",
    "\u0430\u0431\u0432\u0433\u0434 \u03b1\u03b2\u03b3 \u05d0\u05d1 \u0627\u0628\u062a \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u4e00\u4e2d\u6587\u5b57\u65e5\u672c\u8a9e\u306e\u30ab\u30bf\ud55c\uad6d\uc5b4\u3002\uff0c\uff21",
    "e\u0301a\u0308\u0323o\u20d7 \u200b\u200d\ufe0f\u202e\ufeff",
    "\u0660\u0967\u00b2\u00bd\u2167\u2460\uff15\U0001d7da\U00011de0 12",
    " \u0085\u1680\u2000\u200a\u2028\u2029\u202f\u205f\n ab",
    "\u1100\u1161\u11a8\uac00 A\u030a\u212b\u212a\u0958\u0344\u1e9b\u0323",
    "'stremvldSTREMVLD\u017f\u2019 ",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd \u2764\ufe0f",
]
SNIPPETS = [
    *tiny.WORDS.split(),
    "for (int i = 0; i < n; i++) {\n\tx[i] += 1;\n}\n",
    "def f(x):\n    return x ** 2  # squared\n",
    "http://example.org/a?b=c&d=%20e",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<image>",
    "\u2581the",
    "   ",
    "\n\n",
]


def any_char(rng: random.Random) -> str:
    """Of any plane; no half of a surrogate pair."""
    while True:
        code = rng.choice(
            [rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000), rng.randrange(0x110000)]
        )
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def random_string(rng: random.Random) -> str:
    kind = rng.randrange(9)
    if kind < 3:
        alphabet = rng.choice(ALPHABETS)
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
    if kind < 5:
        words = [rng.choice(SNIPPETS) for _ in range(rng.randrange(12))]
        return rng.choice(["", " ", "  ", "\n"]).join(words)
    if kind < 6:
        return "".join(any_char(rng) for _ in range(rng.randrange(24)))
    if kind < 7:
        return "".join(random_piece(rng) for _ in range(rng.randrange(6)))
    if kind < 8:
        return "".join(rng.choice(tiny.WORDS) for _ in range(rng.randrange(60)))
    return some_script(rng)


def some_script(rng: random.Random) -> str:
    """Neighbours of a character, with spaces and digits between."""
    first = ord(any_char(rng))
    codes = [first + rng.randrange(48) for _ in range(rng.randrange(30))]
    return "".join(
        chr(code)
        if code < 0x110000 and not 0xD800 <= code < 0xE000 and rng.randrange(5)
        else rng.choice(" \n1'")
        for code in codes
    )


def random_piece(rng: random.Random) -> str:
    return rng.choice(
        [
            any_char(rng),
            rng.choice(SNIPPETS),
            rng.choice(rng.choice(ALPHABETS)) * rng.randrange(9),
            str(rng.randrange(10**6)),
        ]
    )


def strings(seed: int, n: int) -> Iterator[str]:
    rng = random.Random(seed)
    yield from ["", " ", "  ", "\0", "a\0b", "\u2581", "\u2581\u2581 \u2581", "\U0010ffff"]
    yield from [
        "a" * 5000,
        " " * 3000,
        "the" * 2000,
        "\u4e2d" * 1000,
        "".join(any_char(rng) for _ in range(3000)),
    ]
    for _ in range(n):
        yield random_string(rng)
