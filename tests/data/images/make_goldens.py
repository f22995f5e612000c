"""Writes pixels.json: what the reference makes of drawn pictures of many shapes.

The reference is LLaVA-1.5's: the picture centred on a square of the mean colour, then the image processor of
CLIP in `transformers`. Where that is installed: python tests/data/images/make_goldens.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDENS = Path(__file__).with_name("pixels.json")
MEAN_COLOR = (122, 116, 104)
CASES = [  # width, height, image_size
    *[
        (width, height, 336)
        for width, height in [(1, 1), (2, 3), (336, 336), (337, 336), (640, 480), (480, 640)]
    ],
    *[(width, height, 336) for width, height in [(1000, 37), (37, 1000), (1, 900), (900, 1), (335, 670)]],
    *[(width, height, 224) for width, height in [(224, 100), (500, 333)]],
    *[(width, height, 112) for width, height in [(112, 112), (97, 251), (800, 600)]],
]
SAMPLES = 24


def drawn(width: int, height: int) -> Image.Image:
    """A picture of slopes, stripes and hard edges: the same bytes on every machine."""
    y, x = np.mgrid[0:height, 0:width]
    red = 7 * x + 3 * y
    green = (x // 5 + y // 3) % 2 * 255
    blue = (x * x + 5 * y * y) // 64
    return Image.fromarray((np.stack([red, green, blue], axis=-1) % 256).astype(np.uint8))


def on_square(image: Image.Image) -> Image.Image:
    """The whole square, at full resolution."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def processor(image_size: int, **options: Any) -> Any:
    """The CLIP image processor of `transformers` for a tower of `image_size`."""
    from transformers import CLIPImageProcessor

    sides = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=sides, **options)


def reference(image: Image.Image, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(u8 [3, S, S] after resizing, float32 [3, S, S] normalised)."""
    square = on_square(image)
    resized = processor(image_size, do_rescale=False, do_normalize=False)(square)
    normalised = processor(image_size)(square)
    return np.asarray(resized["pixel_values"][0]).astype(np.uint8), np.asarray(normalised["pixel_values"][0])


def digest(u8: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(u8).tobytes()).hexdigest()[:32]


def sample_indices(n: int) -> list[int]:
    return [(2 * i + 1) * n // (2 * SAMPLES) for i in range(SAMPLES)]


def main() -> None:
    rows = []
    for width, height, image_size in CASES:
        u8, normalised = reference(drawn(width, height), image_size)
        values = [round(float(normalised.flat[i]), 7) for i in sample_indices(normalised.size)]
        rows.append({"size": [width, height], "image_size": image_size, "u8": digest(u8), "values": values})
    GOLDENS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
