"""What a structured answer costs beside one that is free: time per token, and that of its grammar.

    python bench/structured.py [MODEL] [--rounds N]

Structured and free answers of the same number of tokens take turns, so that what else the machine does meets both; the
medians are shown. The grammar's time is processor time of the engine's thread, which other processes do not lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyllava
from pyllava import _constraint

SIX_KEYS = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "number_of_people": {"type": "integer", "minimum": 0, "maximum": 20},
        "dominant_colour": {"enum": ["red", "green", "blue", "yellow", "black", "white"]},
        "is_indoors": {"type": "boolean"},
        "time_of_day": {"enum": ["morning", "noon", "evening", "night"]},
        "short_description": {"type": "string", "maxLength": 24},
    },
    "additionalProperties": False,
}
SIX_KEYS["required"] = list(SIX_KEYS["properties"])  # type: ignore[call-overload]
TEXT = {"type": "string", "minLength": 60, "maxLength": 2000}  # where nothing is forced
PROMPT = "Describe a picture."


class Clock:
    """Processor time that a thread spends in some methods."""

    def __init__(self) -> None:
        self.seconds = self.longest = 0.0

    def watch(self, owner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*arguments)
            finally:
                spent = time.thread_time() - started
                self.seconds += spent
                self.longest = max(self.longest, spent)

        setattr(owner, name, watched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with pyllava.Llava(options.model, n_ctx=1024) as model:
        clock = Clock()
        for name in ("_mask", "_advance"):
            clock.watch(_constraint.Constraint, name)
        for name, schema, n in (("six keys", SIX_KEYS, 256), ("a long text", TEXT, 64)):
            compare(model, clock, name, schema, n, options.rounds)


def timed(model: pyllava.Llava, **options: Any) -> tuple[pyllava.Answer, float, float]:
    """An answer, its seconds from the first token to the last, and all processor time."""
    started = time.process_time()
    answer = model.ask(None, PROMPT, **options)
    return answer, answer.timings.decode, time.process_time() - started


def compare(model: pyllava.Llava, clock: Clock, name: str, schema: Any, n: int, rounds: int) -> None:
    found = []
    model.ask(None, PROMPT, schema=schema, max_tokens=n)  # compiles, and computes the prompt
    for _ in range(rounds):
        clock.seconds = clock.longest = 0.0
        answer, seconds, used = timed(model, schema=schema, max_tokens=n)
        grammar, longest, n_tokens = clock.seconds, clock.longest, len(answer.tokens)
        _, free, used_free = timed(model, max_tokens=n_tokens, ignore_eos=True)
        found.append((seconds, free, used, used_free, grammar, longest))
    seconds, free, used, used_free, grammar, longest = map(statistics.median, zip(*found, strict=True))
    print(
        f"{name}: {n_tokens} tokens, {answer.usage.forced_tokens} of them forced: {seconds:.3f} s, free text {free:.3f} s; "
        f"processor {used:.3f} s, free text {used_free:.3f} s, {used_free / n_tokens * 1e3:.2f} ms a token; "
        f"grammar {grammar / n_tokens * 1e3:.3f} ms a token, {longest * 1e3:.2f} ms at most"
    )


if __name__ == "__main__":
    main()
