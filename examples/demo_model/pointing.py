"""The pointing game: does the peak of a heat map lie on the object that the question asks about?

python -m examples.demo_model.pointing --seed 5 [--questions 300] [--demo 1.6] [--covered tiles]
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import pyllava

from . import evaluate, scenes

KINDS = ("color", "shape", "size", "position")
Box = scenes.Box


class Case(NamedTuple):
    scene: scenes.Scene
    question: scenes.Question
    target: scenes.Shape | scenes.Word


def cases(seed: int) -> Iterator[Case]:
    """Questions about one thing among several, of all kinds in turn, without end."""
    rng = random.Random(f"pointing {seed}")
    n_found = 0
    while True:
        scene = scenes.random_scene(rng)
        if len(scene.shapes) + len(scene.words) < 2:
            continue
        question = scenes.ask(scene, KINDS[n_found % len(KINDS)], rng)
        target = question and asked_about(scene, question)
        if question is not None and target is not None:
            n_found += 1
            yield Case(scene, question, target)


def asked_about(scene: scenes.Scene, question: scenes.Question) -> scenes.Shape | scenes.Word | None:
    """The one thing that the words of a question name; None if they name none or several."""
    wordings = [*scenes.QUESTIONS["shape of color"], *scenes.QUESTIONS[question.kind]]
    patterns = [re.escape(wording).replace(r"\{0\}", "(.*)") for wording in wordings]
    named = next(found[1] for pattern in patterns if (found := re.fullmatch(pattern, question.text)))
    if named == "word":
        return scene.words[0]
    place = next((place for place in scenes.PLACES.values() if named.endswith(place)), None)
    words = named.removesuffix(place or "").split()
    fitting = [
        shape
        for shape in scene.shapes
        if all(word in (shape.kind, shape.color, shape.size, "shape") for word in words)
        and place in (None, scenes.place(shape, scene.size))
    ]
    return fitting[0] if len(fitting) == 1 else None


class Hit(NamedTuple):
    touches: bool  # the peak's cell and the object's box have a point in common
    is_inside: bool  # the cell's centre is in the box
    chance: float  # the share of cells that touch it


def hit(heat: pyllava.HeatMap, case: Case) -> Hit:
    (rows, columns), (width, height) = heat.array.shape, case.scene.size
    x, y = width / columns, height / rows  # of a cell

    def touches(row: int, column: int, margin: float = 0.5) -> bool:
        left, top, right, bottom = case.target.box
        across = left - margin * x <= (column + 0.5) * x <= right + margin * x
        return across and top - margin * y <= (row + 0.5) * y <= bottom + margin * y

    n_touching = sum(touches(row, column) for row in range(rows) for column in range(columns))
    return Hit(touches(*heat.peak), touches(*heat.peak, margin=0), n_touching / heat.array.size)


def play(
    model: pyllava.Llava, seed: int, n_questions: int, covered: pyllava.explain.Covered = "all"
) -> dict[str, list[Hit]]:
    """The hits by kind, of so many questions that the model answers right."""
    found: dict[str, list[Hit]] = {kind: [] for kind in KINDS}
    for case in cases(seed):
        image = scenes.draw(case.scene)
        if not scenes.right(case.question, str(model.ask(image, case.question.text))):
            continue
        heat = model.explain(image, case.question.text, covered=covered)
        found[case.question.kind].append(hit(heat, case))
        if sum(map(len, found.values())) == n_questions:
            return found
    raise AssertionError("there are cases without end")


def table(found: dict[str, list[Hit]]) -> str:
    whole = [hit for hits in found.values() for hit in hits]
    rows = [(kind, hits) for kind, hits in [*found.items(), ("all", whole)] if hits]
    lines = ["question     peak touches it    centre inside    by chance     of"]
    for kind, hits in rows:
        touching, inside, chance = (100 * sum(values) / len(hits) for values in zip(*hits, strict=True))
        lines.append(f"{kind:<12}{touching:>14.1f} %{inside:>15.1f} %{chance:>11.1f} %{len(hits):>7}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--demo", choices=evaluate.DEMOS, default="1.5", help="which model inside pyllava")
    parser.add_argument("--covered", choices=("all", "overview", "tiles"), default="all")
    options = parser.parse_args()
    with pyllava.Llava(evaluate.DEMOS[options.demo]) as model:
        print(table(play(model, options.seed, options.questions, options.covered)))


if __name__ == "__main__":
    main()
