"""Scenes of coloured shapes and one written word: drawn, described, asked about and graded.

Everything is a pure function of a seed. Lengths are in pixels of the 112 x 112 that the model sees.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 112
COLORS = {
    "red": (214, 48, 49),
    "green": (39, 160, 84),
    "blue": (45, 90, 214),
    "yellow": (247, 208, 56),
    "purple": (139, 68, 184),
    "orange": (243, 136, 34),
    "black": (24, 24, 28),
    "white": (250, 250, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "large")
PILLOW_FONT = ""
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", PILLOW_FONT)
WORDS = tuple(
    """
    ant apple arm bear bed bee bell bird boat book box bread bus cake car cat chair coat cow cup day dog
    door drum duck ear egg exit fan fire fish foot fox frog game goal gym hand hat hello hero ice idea
    ink jam jet jump key kite lake lamp leaf leg lion lip log map milk moon mud music nest net nut oak
    open owl pan park pen pig quiz rain rat ring river rock rose rug sea ship shoe sky snow sock stop
    sun table taxi tea tiger toe train tree unit van vase water web wind wolf world yak yard zip zoom
    """.split()  # noqa: SIM905 (as a list of words it fills a page)
)
PLACES = {  # (row, column): how an answer says it
    (0, 0): "at the top left",
    (0, 1): "at the top",
    (0, 2): "at the top right",
    (1, 0): "on the left",
    (1, 1): "in the center",
    (1, 2): "on the right",
    (2, 0): "at the bottom left",
    (2, 1): "at the bottom",
    (2, 2): "at the bottom right",
}
QUESTIONS = {
    "describe": (
        "What is in the picture?", "Describe the image.", "Provide a full description.", "What is this?",
        "Describe it.", "What do you see?", "Describe the picture.", "What is in the image?",
        "What is shown in the picture?", "Describe this image in detail.", "Tell me about the picture.",
    ),
    "color": ("What color is the {0}?", "Which color is the {0}?", "What is the color of the {0}?"),
    "shape": ("What shape is {0}?", "Which shape is {0}?", "What is the shape {0}?"),
    "shape of color": ("What shape is {0}?", "Which shape is {0}?", "What is the {0} shape?"),
    "count": (
        "How many {0} are there?", "How many {0} are in the picture?", "How many {0} do you see?",
        "Count the {0}.",
    ),
    "position": ("Where is the {0}?", "Where in the picture is the {0}?", "What is the position of the {0}?"),
    "background": (
        "What color is the background?", "What is the background color?", "Which color is the background?",
    ),
    "word": (
        "What does the sign say?", "What is the word?", "What word is written?", "Read the word.",
        "What word is in the picture?", "What does the text say?", "What is written here?",
        "Read the text.",
    ),
    "size": ("What size is the {0}?", "Is the {0} large or small?", "How big is the {0}?"),
    "exists": (
        "Is there a {0}?", "Is there a {0} in the picture?", "Do you see a {0}?",
        "Can you see a {0}?",
    ),
}  # fmt: skip
KINDS = ("describe", "color", "shape", "count", "position", "background", "word", "size", "exists")
Box = tuple[float, float, float, float]
Size = tuple[int, int]  # width and height
SQUARE = (SIDE, SIDE)


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Word:
    text: str
    color: str
    font: str
    points: int  # font size in pixels of a picture of 3 * SIDE
    x: float
    y: float

    @property
    def box(self) -> Box:
        left, top, right, bottom = ink(self.font, self.points, self.text)
        width, height = (right - left) / 3, (bottom - top) / 3
        return self.x - width / 2, self.y - height / 2, self.x + width / 2, self.y + height / 2

    def letter_edges(self) -> list[float]:
        """The x of the left edge of every letter, and of the right edge of the last."""
        face = font(self.font, self.points)
        start = self.box[0] - ink(self.font, self.points, self.text)[0] / 3
        return [start + face.getlength(self.text[:n]) / 3 for n in range(len(self.text) + 1)]


@dataclass(frozen=True)
class Scene:
    background: str
    shapes: tuple[Shape, ...]  # in reading order
    words: tuple[Word, ...]  # at most one in a scene that is asked about
    size: Size = SQUARE


@dataclass(frozen=True)
class Question:
    kind: str  # one of KINDS
    text: str
    answer: str


@functools.cache
def font(name: str, points: int) -> ImageFont.FreeTypeFont:
    if not name:
        return ImageFont.load_default(size=points)  # type: ignore[return-value]
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo scenes use the DejaVu fonts that matplotlib ships: pip install matplotlib")
    return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name), points)


@functools.lru_cache(maxsize=1 << 16)
def ink(name: str, points: int, text: str) -> tuple[float, float, float, float]:
    """The box of the written text around its start on the baseline."""
    return font(name, points).getbbox(text, anchor="ls")


def cell(item: Shape | Word, size: Size = SQUARE) -> tuple[int, int]:
    """Row and column of the item's centre in a grid of three by three."""
    return min(2, int(item.y * 3 / size[1])), min(2, int(item.x * 3 / size[0]))


def place(item: Shape | Word, size: Size = SQUARE) -> str:
    return PLACES[cell(item, size)]


# --- drawing ----------------------------------------------------------------------------------------------


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape that is a polygon."""
    r = radius
    if kind == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif kind == "triangle":
        points = [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    elif kind == "cross":
        a = 0.34
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        points += [(-px, -py) for px, py in points]
    elif kind == "star":
        turns = [(-math.pi / 2 + i * math.pi / 5, 1.05 if i % 2 == 0 else 0.45) for i in range(10)]
        points = [(q * math.cos(turn), q * math.sin(turn)) for turn, q in turns]
    else:  # heart
        turn = [2 * math.pi * i / 40 for i in range(40)]
        points = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in turn
        ]
    return [(x + r * px, y + r * py) for px, py in points]


def draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, fill: tuple[int, ...] | int, scale: float) -> None:
    x, y, r = shape.x * scale, shape.y * scale, shape.radius * scale
    if shape.kind == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        canvas.polygon(outline(shape.kind, x, y, r), fill=fill)


def draw(scene: Scene, pixels: int = 3 * SIDE) -> Image.Image:
    """The scene as an RGB picture, with `pixels` for every SIDE."""
    scale = pixels / SIDE
    size = round(scene.size[0] * scale), round(scene.size[1] * scale)
    image = Image.new("RGB", size, COLORS[scene.background])
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw_shape(canvas, shape, COLORS[shape.color], scale)
    for word in scene.words:
        face = font(word.font, round(word.points * scale / 3))
        left, top, right, bottom = face.getbbox(word.text, anchor="ls")
        origin = (word.x * scale - (left + right) / 2, word.y * scale - (top + bottom) / 2)
        canvas.text(origin, word.text, fill=COLORS[word.color], font=face, anchor="ls")
    return image


# --- choosing ---------------------------------------------------------------------------------------------


def contrast(a: str, b: str) -> float:
    luma = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in (COLORS[a], COLORS[b])]
    return abs(luma[0] - luma[1])


def free(box: Box, taken: list[Box], size: Size = SQUARE, margin: float = 2.0) -> bool:
    left, top, right, bottom = box
    if left < 1.5 or top < 1.5 or right > size[0] - 1.5 or bottom > size[1] - 1.5:
        return False
    return all(
        right + margin < a or left - margin > c or bottom + margin < b or top - margin > d
        for a, b, c, d in taken
    )


def _place_word(rng: random.Random, background: str, taken: list[Box], anywhere: bool) -> Word | None:
    text = rng.choice(WORDS)
    color = rng.choice([c for c in COLORS if contrast(c, background) > 40])
    face, points = rng.choice(FONTS), rng.randint(48, 72)
    for _ in range(12):
        x, y = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
        word = Word(text, color, face, points, x, y)
        if not anywhere:
            row, column = cell(word)
            if max(abs(x - (column + 0.5) * SIDE / 3), abs(y - (row + 0.5) * SIDE / 3)) > 11:
                continue
        if free(word.box, taken):
            return word
    return None


def _place_shape(rng: random.Random, kind: str, color: str, taken: list[Box]) -> Shape | None:
    size = rng.choice(SIZES)
    radius = rng.uniform(15, 17) if size == "large" else rng.uniform(7.5, 9.5)
    for _ in range(12):
        row, column = rng.randrange(3), rng.randrange(3)
        x = (column + 0.5) * SIDE / 3 + rng.uniform(-6, 6)
        y = (row + 0.5) * SIDE / 3 + rng.uniform(-6, 6)
        shape = Shape(kind, color, size, x, y, radius)
        if free(shape.box, taken):
            return shape
    return None


def make(rng: random.Random, *, words: int, shapes: int, anywhere: bool = False) -> Scene:
    """A scene with at most so many words and shapes. Asked-about scenes keep one item to a cell."""
    background = rng.choice(tuple(COLORS))
    taken: list[Box] = []
    written = []
    for _ in range(words):
        word = _place_word(rng, background, taken, anywhere)
        if word is not None:
            written.append(word)
            taken.append(word.box)
    colors = [c for c in COLORS if c != background]
    one_kind = rng.choice(SHAPES) if rng.random() < 0.4 else None
    one_color = rng.choice(colors) if rng.random() < 0.35 else None
    drawn: list[Shape] = []
    for _ in range(shapes):
        kind = one_kind if one_kind and rng.random() < 0.8 else rng.choice(SHAPES)
        color = one_color if one_color and rng.random() < 0.8 else rng.choice(colors)
        shape = _place_shape(rng, kind, color, taken)
        if shape is not None and all(cell(shape) != cell(other) for other in drawn):
            drawn.append(shape)
            taken.append(shape.box)
    return Scene(background, tuple(sorted(drawn, key=cell)), tuple(written))


def random_scene(rng: random.Random, word_chance: float = 0.6) -> Scene:
    """A scene to ask about: up to four shapes and perhaps one word."""
    while True:
        words = int(rng.random() < word_chance)
        scene = make(rng, words=words, shapes=rng.choice((0, 1, 2, 3, 4)) if words else rng.randint(1, 4))
        if scene.shapes or scene.words:
            return scene


def busy_scene(rng: random.Random) -> Scene:
    """A crowded scene that teaches the vision tower much in one picture."""
    if rng.random() < 0.8:
        return make(rng, words=rng.randint(3, 9), shapes=rng.randint(0, 2), anywhere=True)
    return make(rng, words=rng.randint(0, 2), shapes=rng.randint(4, 8), anywhere=True)


# --- asking -----------------------------------------------------------------------------------------------


def describe(scene: Scene) -> str:
    """The whole scene in one sentence, in reading order, the word last."""
    parts = [f"a {s.size} {s.color} {s.kind} {place(s, scene.size)}" for s in scene.shapes]
    parts += [f'the word "{w.text}" {place(w, scene.size)}' for w in scene.words]
    listed = " and ".join(([", ".join(parts[:-1])] if parts[1:] else []) + parts[-1:])
    article = "an" if scene.background == "orange" else "a"
    return f"There is {listed}, on {article} {scene.background} background."


def _names(scene: Scene, shape: Shape, rng: random.Random, hide: str) -> str | None:
    """A name that fits this shape alone and does not tell the property that is asked for."""
    options = []
    for with_size in (False, True):
        for with_color in (False, True):
            for noun in (shape.kind, "shape"):
                if (with_size and hide == "size") or (with_color and hide == "color"):
                    continue
                same = [
                    s
                    for s in scene.shapes
                    if (not with_size or s.size == shape.size)
                    and (not with_color or s.color == shape.color)
                    and (noun == "shape" or s.kind == shape.kind)
                ]
                if len(same) == 1 and (noun != "shape" or with_color or with_size):
                    options.append(" ".join([shape.size] * with_size + [shape.color] * with_color + [noun]))
    return rng.choice(options) if options else None


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One question of a kind with its only right answer; None if the scene allows no clear one."""

    def wording(name: str, *values: str) -> str:
        return rng.choice(QUESTIONS[name]).format(*values)

    shape = rng.choice(scene.shapes) if scene.shapes else None
    if kind == "describe":
        return Question(kind, wording(kind), describe(scene))
    if kind == "background":
        return Question(kind, wording(kind), capital(scene.background))
    if kind == "word":
        return Question(kind, wording(kind), scene.words[0].text) if scene.words else None
    if kind == "exists":
        return _ask_exists(scene, rng)
    if kind == "count":
        return _ask_count(scene, rng)
    if kind == "position" and scene.words and (shape is None or rng.random() < 0.2):
        return Question(kind, wording(kind, "word"), capital(place(scene.words[0], scene.size)))
    if shape is None:
        return None
    if kind == "shape" and rng.random() < 0.6:
        return Question(kind, wording(kind, place(shape, scene.size)), capital(shape.kind))
    if kind == "color" and rng.random() < 0.4:
        return Question(kind, wording(kind, f"shape {place(shape, scene.size)}"), capital(shape.color))
    if kind == "shape":
        if sum(s.color == shape.color for s in scene.shapes) > 1:
            return None
        return Question(kind, wording("shape of color", shape.color), capital(shape.kind))
    name = _names(scene, shape, rng, hide=kind)
    if name is None:
        return None
    answer = {"color": shape.color, "size": shape.size, "position": place(shape, scene.size)}[kind]
    return Question(kind, wording(kind, name), capital(answer))


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    """All shapes, those of a kind or those of a color; every possible answer is as likely."""
    what = rng.choice(("shapes", "shapes", "kind", "color"))
    if what == "shapes":
        name, count = "shapes", len(scene.shapes)
    else:
        options = SHAPES if what == "kind" else tuple(COLORS)
        counts = {option: sum(option in (s.kind, s.color) for s in scene.shapes) for option in options}
        count = rng.choice(sorted(set(counts.values())))
        option = rng.choice([option for option in options if counts[option] == count])
        name = f"{option} shapes" if what == "color" else option + ("es" if option == "cross" else "s")
    return Question("count", rng.choice(QUESTIONS["count"]).format(name), str(count))


def _ask_exists(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.15:
        return Question(
            "exists", rng.choice(QUESTIONS["exists"]).format("word"), "Yes" if scene.words else "No"
        )
    there = rng.random() < 0.5
    shape = rng.choice(scene.shapes) if scene.shapes and (there or rng.random() < 0.5) else None
    color = shape.color if shape else rng.choice(tuple(COLORS))
    kind = shape.kind if shape else rng.choice(SHAPES)
    if shape and not there:  # nearly right: one property changed
        color, kind = rng.choice(((rng.choice(tuple(COLORS)), kind), (color, rng.choice(SHAPES))))
    form = rng.randrange(3)
    name = (f"{color} {kind}", kind, f"{color} shape")[form]
    found = any((form == 1 or s.color == color) and (form == 2 or s.kind == kind) for s in scene.shapes)
    text = rng.choice(QUESTIONS["exists"]).format(name).replace("a orange", "an orange")
    return Question("exists", text, "Yes" if found else "No")


def normalise(answer: str) -> str:
    return " ".join(answer.lower().replace('"', "").split()).rstrip(".!")


def right(question: Question, answer: str) -> bool:
    """Exact up to case, quotation marks, spaces and the final full stop."""
    return normalise(answer) == normalise(question.answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws one scene and prints its description.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a picture file")
    options = parser.parse_args()
    scene = random_scene(random.Random(options.seed))
    draw(scene).save(options.out)
    print(describe(scene))


if __name__ == "__main__":
    main()
