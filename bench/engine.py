"""Several callers of one model: streams in turns, threads at once, and how long a prompt delays a stream.

python bench/engine.py                          # the demo models
python bench/engine.py -m model.gguf --long 2000   # another one; random weights will do
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyllava

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "pyllava" / "models"
PICTURES = [ROOT / "examples" / name for name in ("scene.png", "duck.png")]
DESCRIBE = "What is in the picture?"


def medians(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Seconds of each call, made in turns, since a machine is not always equally fast."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeat + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


class Bench:
    """Questions to one model. A model without a projector is asked about texts of random words."""

    def __init__(self, options: argparse.Namespace, model: pyllava.Llava) -> None:
        self.model, self.options = model, options
        self.result: dict[str, Any] = {"model": model.files.model.name, "threads": options.threads}

    def question(self, i: int) -> tuple[Path | None, str]:
        if self.model.info.has_vision:
            return PICTURES[i % len(PICTURES)], DESCRIBE
        return None, f"{i}?"

    def arguments(self, i: int) -> dict[str, Any]:
        vision = self.model.info.has_vision
        random: dict[str, Any] = {} if vision else {"temperature": 1.0, "seed": i, "raw": True}
        return {"max_tokens": self.options.predict, "reuse": False, **random}

    def ask(self, i: int) -> int:
        return len(self.model.ask(*self.question(i), **self.arguments(i)).tokens)

    def in_turns(self) -> None:
        """Two streams, a piece of each in turn, and one after the other."""
        repeat = self.options.repeat

        def begin() -> list[pyllava.Stream]:
            return [self.model.ask(*self.question(i), stream=True, **self.arguments(i)) for i in range(2)]

        def turns() -> None:
            open_ones = begin()
            while open_ones:
                open_ones = [stream for stream in open_ones if next(stream, None) is not None]

        def one_after_the_other() -> None:
            for stream in begin():
                for _ in stream:
                    pass

        before = self.model.stats()
        turns()
        after = self.model.stats()
        self.result["positions_computed"] = after.prompt_tokens - before.prompt_tokens
        seconds = medians({"in_turns": turns, "one_after_the_other": one_after_the_other}, repeat)
        self.result |= {f"{name}_s": value for name, value in seconds.items()}

    def at_once(self) -> None:
        """Eight callers, each in its own thread, and one that asks the same one after the other."""
        n, each = 8, self.options.each
        counts: list[int] = []

        def caller(i: int) -> None:
            counts.extend(self.ask(i * each + k) for k in range(each))

        def threads() -> None:
            running = [threading.Thread(target=caller, args=(i,)) for i in range(n)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()

        def serial() -> None:
            for i in range(n):
                caller(i)

        calls: dict[str, Callable[[], object]] = {"eight_threads": threads, "serial": serial}
        for name, seconds in medians(calls, self.options.repeat).items():
            counts.clear()
            calls[name]()
            self.result[f"{name}_tok_s"] = sum(counts) / seconds

    def waits(self) -> None:
        """The longest time between two tokens of a stream while a prompt of 2,000 rows arrives."""
        times: list[float] = []
        word = len(self.model.tokenize("word word")) - len(self.model.tokenize("word"))
        prompt = "word " * (self.options.long // word)
        other = threading.Thread(
            target=lambda: self.model.ask(None, prompt, raw=True, max_tokens=1, reuse=False)
        )
        stream = self.model.ask(None, "x", raw=True, stream=True, max_tokens=400, temperature=1.0, seed=3)
        for _ in stream:
            times.append(time.perf_counter())
            if len(times) == 10:
                other.start()
            if len(times) > 20 and not other.is_alive():
                break
        stream.close()
        other.join()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        self.result["longest_wait_s"] = max(gaps)
        self.result["usual_wait_s"] = statistics.median(gaps[:9])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", help="GGUF file (default: both demo models)")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("-n", "--predict", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--each", type=int, default=3, help="questions of each of the eight callers")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--long", type=int, default=0, metavar="N", help="rows of a prompt that makes a stream wait"
    )
    options = parser.parse_args()
    demos = [
        (MODELS / f"{name}-q8_0.gguf", MODELS / f"{name}-mmproj-q8_0.gguf") for name in ("demo", "demo-1.6")
    ]
    for model, mmproj in [(options.model, None)] if options.model else demos:
        cells = 8 * (options.predict + 700)
        n_ctx = max(1024, options.long + 64)
        with pyllava.Llava(
            model,
            mmproj,
            n_threads=options.threads,
            n_parallel=8,
            n_ctx=n_ctx,
            kv_cells=max(n_ctx, cells, options.long + 600),
        ) as llava:
            bench = Bench(options, llava)
            bench.in_turns()
            bench.at_once()
            if options.long:
                bench.waits()
            print(json.dumps(bench.result), flush=True)


if __name__ == "__main__":
    main()
