"""Draws the pictures of the documentation: python docs/tools/pictures.py, in the root of a checkout.

- terminal.svg: commands and what they print, from a real run.
- tiles.jpg: a photograph as LLaVA-1.6 sees it, from the views that its tower gets.
- speed.svg: how many times as fast as llama.cpp, from the table in bench/RESULTS.md.
"""

from __future__ import annotations

import html
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from pyllava.images import load_image
from pyllava.views import ImageSpec, preprocess

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures"

SESSION = (
    'pyllava-cli --image examples/scene.png -p "What is in the picture?"',
    'pyllava-cli --image examples/scene.png -p "What colour is the star?"',
    'pyllava-cli -m demo-1.6 --image examples/poster.png -p "What words are there?"',
)
COLUMNS, LINE, LEFT, TOP, CHARACTER = 84, 20, 18, 46, 8.43  # characters, then units of the drawing

# The resolutions of the published LLaVA-1.6 models, with a tower of 336 x 336.
ANYRES = ImageSpec(
    336, aspect="anyres", pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
)
GAP = 12

RATIOS = (  # a bar, the row of the table that it shows, and which of the row's numbers
    ("reading a prompt of 512 tokens, 7B", "prefill of 512, 7B q4_k_m", 0),
    ("1.1B", "prefill of 512, 1.1B q4_k_m", 0),
    ("seeing a picture (CLIP-L/336)", "CLIP-L/336 f16, one view (before fc2 in int8)", 0),
    ("writing eight answers at once, 7B", "decode 7B, one / eight sequences", 1),
    ("1.1B", "decode 1.1B, one / eight sequences", 1),
    ("writing one answer, 7B", "decode 7B, one / eight sequences", 0),
    ("1.1B", "decode 1.1B, one / eight sequences", 0),
)
BAR, ROW, SCALE = 250, 30, 110  # where bars begin, how far apart they are, how long "as fast" is


def terminal() -> str:
    """An SVG of a terminal in which SESSION was typed."""
    lines: list[tuple[str, str]] = []
    for command in SESSION:
        lines.append(("prompt", f"$ {command}"))
        lines += [("answer", line) for line in textwrap.wrap(printed(command), COLUMNS)]
    height = TOP + LINE * len(lines) + 8
    width = round(2 * LEFT + COLUMNS * CHARACTER)
    texts = (
        f'<text class="{kind}" x="{LEFT}" y="{TOP + LINE * i}" xml:space="preserve">{html.escape(line)}</text>'
        for i, (kind, line) in enumerate(lines)
    )
    dots = (f'<circle cx="{LEFT + 4 + 18 * i}" cy="16" r="5" fill="#59616e"/>' for i in range(3))
    style = (
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
        ".prompt{fill:#8bd49c;font-weight:bold}.answer{fill:#e6e9ee}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            f"<style>{style}</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#1e222a"/>',
            *dots,
            *texts,
            "</svg>\n",
        ]
    )


def printed(command: str) -> str:
    words = [sys.executable, "-m", "pyllava", *shlex.split(command)[1:]]
    done = subprocess.run(
        words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def tiles(photograph: Path) -> Image.Image:
    """The first view, distorted to a square, and beside it the tiles in their places."""
    views = preprocess(load_image(photograph), ANYRES)
    deviation, mean = (np.array(values).reshape(1, 3, 1, 1) for values in (ANYRES.std, ANYRES.mean))
    pixels = np.rint((views.pixels * deviation + mean) * 255).clip(0, 255).astype(np.uint8)
    shown = [Image.fromarray(view.transpose(1, 2, 0)) for view in pixels]
    side, (columns, rows) = ANYRES.image_size, views.grid
    height = rows * side + (rows - 1) * GAP
    canvas = Image.new("RGB", (side * (columns + 1) + GAP * (columns + 3), height), "white")
    canvas.paste(shown[0], (0, (height - side) // 2))
    for i, tile in enumerate(shown[1:]):
        x, y = i % columns, i // columns
        canvas.paste(tile, (side + 4 * GAP + x * (side + GAP), y * (side + GAP)))
    return canvas


def speed() -> str:
    """An SVG with a bar for each of RATIOS."""
    results = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    table = results.partition("\n| work | pyllava | llama.cpp | ratio | of the limit |\n")[2].partition(
        "\n\n"
    )[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    ratios = {row[0]: row[3].split(" / ") for row in rows}
    height, width = ROW * len(RATIOS) + 34, BAR + 4 * SCALE + 60
    parts = []
    for i, (name, row, which) in enumerate(RATIOS):
        y, ratio = ROW * i + 8, ratios[row][which]
        length = round(float(ratio) * SCALE)
        parts += [
            f'<text x="{BAR - 10}" y="{y + 15}" text-anchor="end">{name}</text>',
            f'<rect x="{BAR}" y="{y}" width="{length}" height="20" rx="2" fill="#4c72b0"/>',
            f'<text x="{BAR + length + 8}" y="{y + 15}">{ratio}</text>',
        ]
    x, bottom = BAR + SCALE, height - 26
    line = f'<line x1="{x}" y1="0" x2="{x}" y2="{bottom}" stroke="#59616e" stroke-dasharray="4 3"/>'
    as_fast = f'<text x="{x}" y="{height - 8}" text-anchor="middle">as fast as llama.cpp</text>'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = "<style>text{font:13px system-ui,sans-serif;fill:#24292f}</style>"
    back = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([svg, style, back, *parts, line, as_fast, "</svg>\n"])


if __name__ == "__main__":
    (FOLDER / "terminal.svg").write_text(terminal(), encoding="utf-8")
    (FOLDER / "speed.svg").write_text(speed(), encoding="utf-8")
    tiles(FOLDER / "cat.jpg").save(FOLDER / "tiles.jpg", quality=85, optimize=True)
