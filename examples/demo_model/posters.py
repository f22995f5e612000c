"""Posters: scenes of many formats whose writing is too small for one picture of 112 x 112.

A unit of length is a pixel of the poster. Shapes grow with the poster's smaller side; the words do not, so that
every letter has as many pixels in a full-resolution tile as those of the square scenes have in the one view.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pyllava.views import best_resolution

from . import scenes
from .anyres import PINPOINTS, fit
from .scenes import SIDE, Question, Scene, Shape, Size, Word, capital, place

QUESTIONS = {
    "words": (
        "What words are there?", "Which words are there?", "Read all the words.", "What is written here?",
        "What words are in the picture?", "Read the text.", "What does the text say?",
    ),
    "word of color": (
        "What does the {0} word say?", "Read the {0} word.", "What is the {0} word?", "What word is {0}?",
        "Which word is {0}?", "What does the {0} text say?",
    ),
    "word at place": (
        "What does the word {0} say?", "What is the word {0}?", "Read the word {0}.", "What word is {0}?",
        "Which word is {0}?", "What is written {0}?",
    ),
    "color of word": ("What color is the word {0}?", "Which color is the word {0}?"),
    "place of word": ("Where is the word {0}?", "Where in the picture is the word {0}?"),
    "count words": ("How many words are there?", "How many words are in the picture?", "Count the words."),
}  # fmt: skip
SHAPE_KINDS = tuple(kind for kind in scenes.KINDS if kind not in ("describe", "word"))
KINDS = ("describe", *QUESTIONS, *SHAPE_KINDS)
WRITING_KINDS = ("only word", "word of color", "word at place")


def random_size(rng: random.Random, shape: Size) -> Size:
    """A size for which `shape` is the best resolution, scaled to it by nearly one."""
    while True:
        if rng.random() < 0.3:
            return shape
        scale = rng.uniform(0.9, 1.1)
        size = tuple(
            round(side * scale * (rng.uniform(0.7, 1) if rng.random() < 0.6 else 1)) for side in shape
        )
        width, height = size
        if (
            best_resolution((width, height), PINPOINTS) == shape
            and fit((width, height), shape)[0] <= 1.25 * width
        ):
            return width, height


def _spot(rng: random.Random, cell: tuple[int, int], size: Size) -> tuple[float, float]:
    """A point well inside a cell of the three by three."""
    x, y = ((n + 0.5 + rng.uniform(-0.29, 0.29)) * side / 3 for n, side in zip(cell[::-1], size, strict=True))
    return x, y


def random_poster(rng: random.Random, shape: Size | None = None, words: int | None = None) -> Scene:
    """A poster with so many words (1 to 4 by default) and up to three shapes, each in a cell of its own."""
    size = random_size(rng, shape or rng.choice(PINPOINTS))
    background = rng.choice(tuple(scenes.COLORS))
    readable = [c for c in scenes.COLORS if scenes.contrast(c, background) > 40]
    cells = rng.sample(list(scenes.PLACES), 9)
    texts = rng.sample(scenes.WORDS, 9)
    taken: list[scenes.Box] = []
    written: list[Word] = []
    count = words or rng.choice((1, 2, 2, 3, 3, 4))
    shapes = rng.choice((0, 1, 1, 2, 2, 3))
    one_kind = rng.choice(scenes.SHAPES) if rng.random() < 0.3 else None
    drawn: list[Shape] = []
    for cell, text in zip(cells, texts, strict=True):
        face, points, color = rng.choice(scenes.FONTS), rng.randint(45, 66), rng.choice(readable)
        if any(w.color == color for w in written) and rng.random() < 0.7:
            color = rng.choice(readable)
        kind = one_kind or rng.choice(scenes.SHAPES)
        paint = rng.choice([c for c in scenes.COLORS if c != background])
        big = "large" if rng.random() < 0.2 else "small"
        radius = (rng.uniform(15, 17) if big == "large" else rng.uniform(7.5, 9.5)) * min(size) / SIDE
        for _ in range(8):
            x, y = _spot(rng, cell, size)
            if len(written) < count:
                word = Word(text, color, face, points, x, y)
                if scenes.free(word.box, taken, size, 4.0):
                    written.append(word)
                    taken.append(word.box)
                    break
            elif len(drawn) < shapes:
                drawing = Shape(kind, paint, big, x, y, radius)
                if scenes.free(drawing.box, taken, size, 3.0):
                    drawn.append(drawing)
                    taken.append(drawing.box)
                    break
    if not written:
        return random_poster(rng, shape, words)

    def order(item: Shape | Word) -> tuple[int, int]:
        return scenes.cell(item, size)

    return Scene(background, tuple(sorted(drawn, key=order)), tuple(sorted(written, key=order)), size)


def draw(scene: Scene) -> Image.Image:
    """The poster as an RGB picture of its size, smooth at the edges."""
    return scenes.draw(scene).resize(scene.size, Image.Resampling.BICUBIC)


def listed(texts: list[str]) -> str:
    return " and ".join(([", ".join(texts[:-1])] if texts[1:] else []) + texts[-1:])


def word_question(scene: Scene, word: Word, rng: random.Random, by: str | None = None) -> Question:
    """Asks for one word by its color, if that names it (or by its place)."""
    alone = sum(w.color == word.color for w in scene.words) == 1
    by = by or ("word of color" if alone and rng.random() < 0.6 else "word at place")
    name = word.color if by == "word of color" else place(word, scene.size)
    return Question(by, rng.choice(QUESTIONS[by]).format(name), word.text)


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One question of a kind with its only right answer; None if the poster allows no clear one."""
    if kind == "describe":
        return scenes.ask(scene, kind, rng)
    if kind in SHAPE_KINDS:
        return scenes.ask(scene if len(scene.words) == 1 else replace(scene, words=()), kind, rng)
    if not scene.words:
        return None
    word = rng.choice(scene.words)
    if kind == "word of color":
        alone = [w for w in scene.words if sum(o.color == w.color for o in scene.words) == 1]
        return word_question(scene, rng.choice(alone), rng, kind) if alone else None
    if kind == "word at place":
        return word_question(scene, word, rng, kind)
    if kind == "words":
        if len(scene.words) == 1 and rng.random() < 0.7:
            return Question(kind, rng.choice(scenes.QUESTIONS["word"]), scene.words[0].text)
        return Question(kind, rng.choice(QUESTIONS[kind]), listed([w.text for w in scene.words]))
    text = rng.choice(QUESTIONS[kind]).format(word.text)
    if kind == "color of word":
        return Question(kind, text, capital(word.color))
    if kind == "place of word":
        return Question(kind, text, capital(place(word, scene.size)))
    return Question(kind, text, str(len(scene.words)))


def exam(seed: int, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Posters, each with one question of every kind that it allows."""
    rng = random.Random(f"posters {seed}")
    for _ in range(count):
        scene = random_poster(rng)
        asked = [ask(scene, kind, rng) for kind in KINDS]
        yield scene, [question for question in asked if question is not None]


def writing_exam(seed: int, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Posters, each asked for every one of its words; a word that is alone in the way that the square scenes ask."""
    rng = random.Random(f"writing {seed}")
    for _ in range(count):
        scene = random_poster(rng)
        if len(scene.words) == 1:
            text = rng.choice(scenes.QUESTIONS["word"])
            yield scene, [Question("only word", text, scene.words[0].text)]
        else:
            yield scene, [word_question(scene, word, rng) for word in scene.words]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws one poster and prints its description.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a picture file")
    options = parser.parse_args()
    scene = random_poster(random.Random(options.seed))
    draw(scene).save(options.out)
    print(scenes.describe(scene))


if __name__ == "__main__":
    main()
