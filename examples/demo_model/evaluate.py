"""Asks pyllava about pictures it has never seen and counts the right answers.

python -m examples.demo_model.evaluate --seed 7 [--scenes 500] [--model LLM --mmproj MMPROJ] [--json]
python -m examples.demo_model.evaluate --seed 7 --demo 1.6 --exam writing [--image-merge flat]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from . import posters, scenes

Ask = Callable[[Image.Image, str], str]
Papers = Iterator[tuple[scenes.Scene, list[scenes.Question]]]
Counts = dict[str, tuple[int, int]]
DEMOS = {"1.5": "demo", "1.6": "demo-1.6"}  # the names that pyllava knows


def exam(seed: int, count: int) -> Papers:
    """Scenes, each with one question of every kind that it allows."""
    rng = random.Random(f"exam {seed}")
    for _ in range(count):
        scene = scenes.random_scene(rng)
        asked = [scenes.ask(scene, kind, rng) for kind in scenes.KINDS]
        yield scene, [question for question in asked if question is not None]


class Exam(NamedTuple):
    papers: Callable[[int, int], Papers]
    kinds: tuple[str, ...]
    draw: Callable[[scenes.Scene], Image.Image]


EXAMS = {
    "scenes": Exam(exam, scenes.KINDS, scenes.draw),
    "posters": Exam(posters.exam, posters.KINDS, posters.draw),
    "writing": Exam(posters.writing_exam, posters.WRITING_KINDS, posters.draw),
}


def grade(ask: Ask, seed: int, count: int, show: bool = False, of: Exam = EXAMS["scenes"]) -> Counts:
    """Right and total answers for each kind of question."""
    counts = dict.fromkeys(of.kinds, (0, 0))
    for number, (scene, questions) in enumerate(of.papers(seed, count)):
        image = of.draw(scene)
        for question in questions:
            answer = ask(image, question.text)
            good = scenes.right(question, answer)
            counts[question.kind] = counts[question.kind][0] + good, counts[question.kind][1] + 1
            if show and not good:
                print(f"scene {number}: {question.text} {answer!r}, not {question.answer!r}", file=sys.stderr)
    return counts


def percent(right: int, total: int) -> float:
    return 100 * right / total if total else 0.0


def table(counts: Counts) -> str:
    whole = sum(right for right, _ in counts.values()), sum(total for _, total in counts.values())
    rows = [*counts.items(), ("all", whole)]
    return "\n".join(f"{kind:<14}{r:>6} / {t:<6}{percent(r, t):>6.1f} %" for kind, (r, t) in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=500, help="how many pictures")
    parser.add_argument(
        "--exam", choices=EXAMS, default="scenes", help="squares, posters, or a poster's words"
    )
    parser.add_argument("--demo", choices=DEMOS, default="1.5", help="which model inside pyllava")
    parser.add_argument("--model", type=Path, help="instead of --demo, with --mmproj")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument(
        "--image-merge", choices=("unpad", "flat"), help="of a 1.6 (default: as it was trained)"
    )
    parser.add_argument("--threads", type=int, help="default: as pyllava chooses")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--show", action="store_true", help="print every wrong answer to stderr")
    options = parser.parse_args()
    if (options.model is None) != (options.mmproj is None):
        parser.error("--model and --mmproj go together")
    return options


def main() -> None:
    options = parse()
    import pyllava

    chosen = {"image_merge": options.image_merge, "n_threads": options.threads}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    with pyllava.Llava(options.model or DEMOS[options.demo], options.mmproj, **chosen) as model:

        def ask(image: Image.Image, text: str) -> str:
            return str(model.ask(image, text))

        counts = grade(ask, options.seed, options.scenes, options.show, EXAMS[options.exam])
    if options.json:
        kinds = {kind: {"right": r, "total": t} for kind, (r, t) in counts.items()}
        print(json.dumps({"seed": options.seed, "scenes": options.scenes, "kinds": kinds}))
    else:
        print(table(counts))


if __name__ == "__main__":
    main()
