"""The tokens of an answer, coloured by their probabilities: for terminals, and as HTML.

Tokens are hostile text. Whatever is not a visible character is written out as an escape, and HTML is escaped besides.
"""

from __future__ import annotations

import html
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from .answer import Answer, TokenLogprob


@dataclass(frozen=True)
class _Band:
    """Probabilities from `least` on, and their colour: of a terminal's 256, and of the web."""

    least: float
    words: str
    terminal: int
    web: str


_BANDS = (  # from blue to orange, which people with colour-blindness tell apart, too; the unsure ones are the striking ones
    _Band(0.9, "90 % or more", 153, "#d3e6f8"),
    _Band(0.7, "70 %", 195, "#e9f4fb"),
    _Band(0.5, "50 %", 230, "#fdf3d0"),
    _Band(0.3, "30 %", 222, "#fbd79a"),
    _Band(0.0, "less", 215, "#f7ab62"),
)
_BOX = "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; color: #111; background: #fff"
_NOTE = "color: #666; font-size: 85%"


def text_of(token: TokenLogprob) -> str:
    """What a token looks like: its characters, and escapes for what is none or cannot be seen."""
    try:
        text = token.bytes.decode()
    except UnicodeDecodeError:  # a part of a character
        return "".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in token.bytes)
    return visible(text)


def visible(text: str, keep: str = "") -> str:
    """`text` with escapes for controls, marks that turn the direction of reading, and the like, but for those in `keep`."""
    return "".join(
        c.encode("unicode_escape").decode() if _is_hidden(c) and c not in keep else c for c in text
    )


def _is_hidden(c: str) -> bool:
    """True for what is obeyed and not shown. The joiners are part of how Persian, Hindi and emoji are written."""
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"


def _probability(token: TokenLogprob) -> float:
    return math.exp(min(token.logprob, 0.0))


def _band(token: TokenLogprob) -> _Band:
    p = _probability(token)
    return next((band for band in _BANDS if p >= band.least), _BANDS[-1])


def percent(token: TokenLogprob) -> str:
    """``98.3 %``; two significant digits below one per cent, ``0.0021 %``."""
    p = 100 * _probability(token)
    return f"{p:.1f} %" if p >= 1 else f"{p:.2g} %"


# --- a terminal ---


def takes_color(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal that shows colours, and nobody asked for none (no-color.org)."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def terminal_lines(tokens: Sequence[TokenLogprob], *, colored: bool) -> Iterator[str]:
    """The tokens in colours with a legend (if `colored`), then a line for each with its alternatives.

    Without alternatives and with colours there is no table: the colours say it.
    """
    if colored:
        legend = " ".join(_painted(f" {band.words} ", band) for band in _BANDS)
        yield f"probability: {legend}"
        yield from _running(tokens)
    if not colored or any(token.alternatives for token in tokens):
        yield from _table(tokens)


def _painted(text: str, band: _Band) -> str:
    return f"\x1b[30;48;5;{band.terminal}m{text}\x1b[0m"


def _running(tokens: Sequence[TokenLogprob]) -> Iterator[str]:
    """The text; a line ends behind a token that ends one."""
    line = ""
    for token in tokens:
        line += _painted(text_of(token), _band(token))
        if token.bytes.endswith(b"\n"):
            yield line
            line = ""
    if line:
        yield line


def _table(tokens: Sequence[TokenLogprob]) -> Iterator[str]:
    shown = [_quoted(token) for token in tokens]
    width = max(map(len, shown), default=0)
    for number, (token, text) in enumerate(zip(tokens, shown, strict=True), 1):
        others = [f"{_quoted(other)} {percent(other)}" for other in token.alternatives]
        yield f"{number:5d}  {text:<{width}}  {percent(token):>8}  {'  '.join(others)}".rstrip()


def _quoted(token: TokenLogprob) -> str:
    return f"'{text_of(token)}'"


# --- HTML ---


def answer_html(answer: Answer) -> str:
    """An answer as HTML without scripts: its text, or its tokens in colours, with the alternatives as tooltips."""
    if not answer.logprobs:
        return f'<div style="{_BOX}">{_escaped(answer.text)}</div>'
    before = _escaped(begun_with(answer))
    spans = "".join(map(_span, answer.logprobs))
    legend = " ".join(f'<span style="background: {b.web}; padding: 0 0.4em">{b.words}</span>' for b in _BANDS)
    return f'<div style="{_BOX}">{before}{spans}\n<span style="{_NOTE}">probability: {legend}</span></div>'


def begun_with(answer: Answer) -> str:
    """The beginning of an answer's text that is none of its tokens (`start_with`)."""
    written = b"".join(token.bytes for token in answer.logprobs).decode(errors="replace").strip()
    text = answer.text
    at = next((i for i in range(len(text)) if written.startswith(text[i:].strip())), 0)
    return text[:at]


def _span(token: TokenLogprob) -> str:
    told = [f"{text_of(token)}  {percent(token)}"]
    told += [f"{text_of(other)}  {percent(other)}" for other in token.alternatives]
    title = html.escape("\n".join(told)).replace("\n", "&#10;")
    shown = text_of(token) + ("\n" if token.bytes.endswith(b"\n") else "")
    return f'<span style="background: {_band(token).web}" title="{title}">{html.escape(shown)}</span>'


def _escaped(text: str) -> str:
    return html.escape(visible(text, keep="\n\t"))
