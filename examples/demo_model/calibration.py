"""Are the probabilities of two choices those with which they are right? Asked of yes/no questions of the exam.

python -m examples.demo_model.calibration --seed 5 [--questions 200] [--demo 1.6] [--normalize mean]
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

import pyllava

from . import evaluate, scenes

CHOICES = ("Yes", "No")
BINS = (0.5, 0.9, 0.99, 0.999, 1.0)


class Scored(NamedTuple):
    probability: float  # of the likelier choice
    is_right: bool
    is_said: bool  # it is also what the model answers


def questions(seed: int) -> Iterator[tuple[Image.Image, scenes.Question]]:
    """Yes/no questions about scenes, without end."""
    rng = random.Random(f"calibration {seed}")
    while True:
        scene = scenes.random_scene(rng)
        question = scenes.ask(scene, "exists", rng)
        if question is not None:
            yield scenes.draw(scene), question


def scored(model: pyllava.Llava, seed: int, n_questions: int, normalize: str = "sum") -> list[Scored]:
    found = []
    for (image, question), _ in zip(questions(seed), range(n_questions), strict=False):
        shares = model.score(image, question.text, CHOICES, normalize=normalize)  # type: ignore[arg-type]
        choice = max(shares, key=lambda choice: shares[choice])
        said = str(model.ask(image, question.text, max_tokens=8))
        found.append(Scored(shares[choice], scenes.right(question, choice), said == choice))
    return found


def table(found: list[Scored]) -> str:
    lines = ["probability of the choice      of    mean    right"]
    for low, high in itertools.pairwise(BINS):
        part = [one for one in found if low <= one.probability < high or (high == 1.0 == one.probability)]
        if part:
            mean, right = (100 * sum(v) / len(part) for v in list(zip(*part, strict=True))[:2])
            lines.append(f"{low:<6} to {high:<6}{len(part):>16}{mean:>8.2f} %{right:>7.1f} %")
    probability, is_right, is_said = (sum(values) / len(found) for values in zip(*found, strict=True))
    brier = sum((one.probability - one.is_right) ** 2 for one in found) / len(found)
    lines.append(f"{'all':<16}{len(found):>16}{100 * probability:>8.2f} %{100 * is_right:>7.1f} %")
    lines.append(
        f"Brier score {brier:.4f}; the likelier choice is the model's own answer in {100 * is_said:.1f} %"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--demo", choices=evaluate.DEMOS, default="1.5", help="which model inside pyllava")
    parser.add_argument("--normalize", choices=("sum", "mean"), default="sum")
    options = parser.parse_args()
    with pyllava.Llava(evaluate.DEMOS[options.demo]) as model:
        print(table(scored(model, options.seed, options.questions, options.normalize)))


if __name__ == "__main__":
    main()
