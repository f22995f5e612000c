"""Asks pyllava about scenes it has never seen and counts the right answers.

python -m examples.demo_model.evaluate --seed 7 [--scenes 500] [--model LLM --mmproj MMPROJ] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from . import scenes

Ask = Callable[[Image.Image, str], str]


def exam(seed: int, count: int) -> Iterator[tuple[scenes.Scene, list[scenes.Question]]]:
    """Scenes, each with one question of every kind that it allows."""
    rng = random.Random(f"exam {seed}")
    for _ in range(count):
        scene = scenes.random_scene(rng)
        asked = [scenes.ask(scene, kind, rng) for kind in scenes.KINDS]
        yield scene, [question for question in asked if question is not None]


def grade(ask: Ask, seed: int, count: int, show: bool = False) -> dict[str, tuple[int, int]]:
    """Right and total answers for each kind of question."""
    counts = dict.fromkeys(scenes.KINDS, (0, 0))
    for number, (scene, questions) in enumerate(exam(seed, count)):
        image = scenes.draw(scene)
        for question in questions:
            answer = ask(image, question.text)
            good = scenes.right(question, answer)
            counts[question.kind] = counts[question.kind][0] + good, counts[question.kind][1] + 1
            if show and not good:
                print(f"scene {number}: {question.text} {answer!r}, not {question.answer!r}", file=sys.stderr)
    return counts


def percent(right: int, total: int) -> float:
    return 100 * right / total if total else 0.0


def table(counts: dict[str, tuple[int, int]]) -> str:
    whole = sum(right for right, _ in counts.values()), sum(total for _, total in counts.values())
    rows = [*counts.items(), ("all", whole)]
    return "\n".join(f"{kind:<12}{r:>6} / {t:<6}{percent(r, t):>6.1f} %" for kind, (r, t) in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--model", type=Path, help="default: the model inside pyllava")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--show", action="store_true", help="print every wrong answer to stderr")
    options = parser.parse_args()
    if (options.model is None) != (options.mmproj is None):
        parser.error("--model and --mmproj go together")
    import pyllava

    chosen = {} if options.model is None else {"model": options.model, "mmproj": options.mmproj}
    with pyllava.Llava(**chosen) as model:

        def ask(image: Image.Image, text: str) -> str:
            return str(model.ask(image, text))

        counts = grade(ask, options.seed, options.scenes, options.show)
    if options.json:
        kinds = {kind: {"right": r, "total": t} for kind, (r, t) in counts.items()}
        print(json.dumps({"seed": options.seed, "scenes": options.scenes, "kinds": kinds}))
    else:
        print(table(counts))


if __name__ == "__main__":
    main()
