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
        self.seconds, self.n, self.longest = 0.0, 0, 0.0

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
        started = time.process_time()
        vocabulary(model)
        print(f"vocabulary of {model.info.n_vocab}: {time.process_time() - started:.2f} s, once for a model")
        clock = Clock()
        for name in ("_mask", "_advance"):
            clock.watch(_constraint.Constraint, name)
        for name, schema, n in (("six keys", SIX_KEYS, 256), ("a long text", TEXT, 64)):
            compare(model, clock, name, schema, n, options.rounds)


def vocabulary(model: pyllava.Llava) -> None:
    model.ask(None, PROMPT, choices=["a"])


def compare(model: pyllava.Llava, clock: Clock, name: str, schema: Any, n: int, rounds: int) -> None:
    structured, free, grammar = [], [], []
    for _ in range(rounds):
        clock.seconds = clock.longest = 0.0
        answer = model.ask(None, PROMPT, schema=schema, max_tokens=n, logit_bias={"\n": -100})
        grammar.append((clock.seconds, clock.longest))
        other = model.ask(None, PROMPT, max_tokens=len(answer.tokens), ignore_eos=True)
        structured.append(answer.timings.decode)
        free.append(other.timings.decode)
    n_tokens, n_forced = len(answer.tokens), answer.usage.forced_tokens
    in_grammar, longest = (statistics.median(values) for values in zip(*grammar, strict=True))
    step = statistics.median(free) / (n_tokens - 1)
    print(
        f"{name}: {n_tokens} tokens, {n_forced} of them forced: {statistics.median(structured):.3f} s, "
        f"free text {statistics.median(free):.3f} s ({step * 1e3:.1f} ms a token); grammar {in_grammar / n_tokens * 1e6:.0f} us "
        f"a token ({in_grammar / n_tokens / step:.1%} of it), {longest * 1e3:.2f} ms at most"
    )


if __name__ == "__main__":
    main()
