"""Pictures per second, and CPU time for each: `Llava.batch` beside a loop over `ask`, in turns, on drawn scenes new to both.

python bench/captions.py [--pictures 300] [--rounds 5] [--parallel 8] [--model MODEL] [--mmproj FILE] [--tokens N]
                         [--peer PYTHON --peer-pictures 4]

With --tokens all answers have that length. With --peer, the Python of an environment with llama-cpp-python, llama.cpp
describes the first pictures of each round, too: one by one, and as many at once as its batches can hold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pyllava
from examples.demo_model import scenes

QUESTION = "Describe the image."


def draw(folder: Path, n: int, seed: str) -> list[Path]:
    rng = random.Random(seed)
    paths = [folder / f"{seed}-{number:05}.png" for number in range(n)]
    for path in paths:
        scenes.draw(scenes.random_scene(rng)).save(path)
    return paths


def loop(model: pyllava.Llava, paths: list[Path], sampling: dict[str, Any]) -> list[str]:
    return [model.ask(path, QUESTION, **sampling).text for path in paths]


def batch(model: pyllava.Llava, paths: list[Path], sampling: dict[str, Any]) -> list[str]:
    return [str(result.answer) for result in model.batch(paths, QUESTION, **sampling)]


def peer(options: argparse.Namespace, paths: list[Path], n_parallel: int) -> float:
    """Pictures per second of llama.cpp, its model loaded before."""
    script = Path(__file__).with_name("peer_llama_cpp_captions.py")
    command = [options.peer, script, "-m", options.model, "--mmproj", options.mmproj]
    command += ["-n", str(options.tokens), "--parallel", str(n_parallel), *map(str, paths)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    speed: float = json.loads(found.stdout)["pictures_per_second"]
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=300, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--tokens", type=int, help="of every answer")
    parser.add_argument(
        "--peer", help="a Python that has llama-cpp-python; needs --model, --mmproj, --tokens"
    )
    parser.add_argument("--peer-pictures", type=int, default=4)
    options = parser.parse_args()
    sampling: dict[str, Any] = {"max_tokens": options.tokens, "ignore_eos": True} if options.tokens else {}
    speeds: dict[str, list[float]] = {"loop": [], "batch": []}
    cpu: dict[str, list[float]] = {"loop": [], "batch": []}
    peers: dict[str, list[float]] = {"llama.cpp, one by one": [], "llama.cpp, in batches": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        pyllava.Llava(options.model, options.mmproj) as one,
        pyllava.Llava(
            options.model, options.mmproj, n_parallel=options.parallel, kv_cells="pictures"
        ) as many,
    ):
        for path in draw(Path(folder), 1, "first"):  # so that all files have been read once
            for model in (one, many):
                model.ask(path, QUESTION, max_tokens=1)
        for number in range(options.rounds):
            paths = draw(Path(folder), options.pictures, f"round{number}")
            answers = {}
            for name, run, model in (("loop", loop, one), ("batch", batch, many)):
                started, cpu_before = time.perf_counter(), time.process_time()
                answers[name] = run(model, paths, sampling)
                speeds[name].append(len(paths) / (time.perf_counter() - started))
                cpu[name].append(1000 * (time.process_time() - cpu_before) / len(paths))
            assert answers["loop"] == answers["batch"]
            if options.peer:
                few = paths[: options.peer_pictures]
                for name, n in zip(peers, (1, len(few)), strict=True):
                    peers[name].append(peer(options, few, n))
            print(
                f"round {number}: "
                + ", ".join(f"{name} {found[-1]:.3g}" for name, found in (speeds | peers).items() if found),
                flush=True,
            )
    ratios = [b / a for a, b in zip(speeds["loop"], speeds["batch"], strict=True)]
    for title, found in (
        *((f"{name}, pictures per second", found) for name, found in (speeds | peers).items() if found),
        ("batch / loop", ratios),
        *(
            (f"batch / {name}", [b / a for a, b in zip(found, speeds["batch"], strict=True)])
            for name, found in peers.items()
            if found
        ),
        *((f"{name}, ms of CPU time per picture", found) for name, found in cpu.items()),
    ):
        print(f"{title}: median {statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})")


if __name__ == "__main__":
    main()
