"""Pictures per second, and CPU time for each: `Llava.batch` beside a loop over `ask`, in turns, on drawn scenes new to both.

python bench/captions.py [--pictures 300] [--rounds 5] [--parallel 8] [--model MODEL]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import pyllava
from examples.demo_model import scenes

QUESTION = "Describe the image."


def draw(folder: Path, n: int, seed: str) -> list[Path]:
    rng = random.Random(seed)
    paths = [folder / f"{seed}-{number:05}.png" for number in range(n)]
    for path in paths:
        scenes.draw(scenes.random_scene(rng)).save(path)
    return paths


def loop(model: pyllava.Llava, paths: list[Path]) -> list[str]:
    return [model.ask(path, QUESTION).text for path in paths]


def batch(model: pyllava.Llava, paths: list[Path]) -> list[str]:
    return [str(result.answer) for result in model.batch(paths, QUESTION)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=300, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--model")
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {"loop": [], "batch": []}
    cpu: dict[str, list[float]] = {"loop": [], "batch": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        pyllava.Llava(options.model) as one,
        pyllava.Llava(options.model, n_parallel=options.parallel, kv_cells="pictures") as many,
    ):
        for number in range(options.rounds):
            paths = draw(Path(folder), options.pictures, f"round{number}")
            answers = {}
            for name, run, model in (("loop", loop, one), ("batch", batch, many)):
                started, cpu_before = time.perf_counter(), time.process_time()
                answers[name] = run(model, paths)
                speeds[name].append(len(paths) / (time.perf_counter() - started))
                cpu[name].append(1000 * (time.process_time() - cpu_before) / len(paths))
            assert answers["loop"] == answers["batch"]
            print(
                f"round {number}: " + ", ".join(f"{name} {found[-1]:.1f}" for name, found in speeds.items())
            )
    ratios = [b / a for a, b in zip(speeds["loop"], speeds["batch"], strict=True)]
    for title, found in (
        *((f"{name}, pictures per second", found) for name, found in speeds.items()),
        ("batch / loop", ratios),
        *((f"{name}, ms of CPU time per picture", found) for name, found in cpu.items()),
    ):
        print(f"{title}: median {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
