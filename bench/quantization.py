"""What each type of `pyllava-cli quantize` costs: size, and how far probabilities move from those of f16.

python bench/quantization.py [--model LLM --mmproj MMPROJ] [--scenes 40] [--seed 1]

It prints the tables of docs/quantization.md.

The f16 model describes drawn scenes (greedily); every other file then gives its probabilities for the same
words, and they are compared position by position: mean Kullback-Leibler divergence in nats, and how often the
likeliest token is the same.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # examples/, and pyllava where it is not installed

from examples.demo_model import scenes  # noqa: E402
from pyllava import Llava  # noqa: E402
from pyllava.quantize import TYPES, Report, quantize  # noqa: E402
from pyllava.templates import Message, by_name, prompt_text, render  # noqa: E402

DEMO = ROOT / "tests" / "data" / "demo"
QUESTION = "Provide a full description."
MIXES = {mix.name: mix for mix in TYPES.values()}
BASES = {
    mix.base: mix for mix in reversed(MIXES.values())
}  # a projector has no mixes: the first name of each base
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A picture, and a raw prompt of question and answer whose last `n_answer` + 1 positions are compared."""

    picture: Any
    prompt: str
    n_answer: int


def cases(model: Llava, n: int, seed: int) -> Iterator[Case]:
    rng = random.Random(f"quantization {seed}")
    template = by_name("vicuna_v1")
    for _ in range(n):
        picture = scenes.draw(scenes.random_scene(rng))
        answer = str(model.ask(picture, QUESTION, max_tokens=128))
        question = prompt_text(render(template, [Message("user", f"<image>\n{QUESTION}")]))
        yield Case(picture, f"{question} {answer}", len(model.tokenize(answer)))


def log_probabilities(model: Llava, case: Case) -> Array:
    """[n_answer + 1, n_vocab]: of every token of the answer and of its end."""
    logits = model.logits(case.picture, case.prompt, raw=True)[-case.n_answer - 1 :].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def compare(model: Llava, asked: Iterable[Case], expected: Iterable[Array]) -> tuple[float, float]:
    """Mean divergence and top-1 agreement over all positions."""
    divergences, agreements = [], []
    for case, p in zip(asked, expected, strict=True):
        q = log_probabilities(model, case)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        agreements.append(p.argmax(axis=1) == q.argmax(axis=1))
    return float(np.concatenate(divergences).mean()), float(np.concatenate(agreements).mean())


def row(name: str, report: Report, kld: float, agreement: float) -> str:
    size = f"{report.n_bytes / 1e6:.2f} MB | {report.bits_per_weight:.2f}"
    return f"| {name} | {size} | {kld:.2g} | {100 * agreement:.2f} % | {len(report.fallbacks)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO / "demo-f16.gguf")
    parser.add_argument("--mmproj", type=Path, default=DEMO / "demo-mmproj-f16.gguf")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settings = {"n_threads": options.threads, "template": "vicuna_v1", "precision": "exact"}
    with Llava(options.model, options.mmproj, **settings) as reference:
        asked = list(cases(reference, options.scenes, options.seed))
        expected = [log_probabilities(reference, case) for case in asked]
    n_positions = sum(len(p) for p in expected)
    print(f"{len(asked)} scenes, {n_positions} positions, seed {options.seed}")
    for title in ("language model", "projector"):
        print(f"\n| {title} | size | bits per weight | mean KL divergence | same top token | fallbacks |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in MIXES if title == "language model" else [mix.name for mix in reversed(BASES.values())]:
            with tempfile.TemporaryDirectory() as folder:
                out, changed = Path(folder) / "quantized.gguf", title == "projector"
                report = quantize(options.mmproj if changed else options.model, out, name)
                files = (options.model, out) if changed else (out, options.mmproj)
                with Llava(*files, **settings) as model:
                    print(row(name, report, *compare(model, asked, expected)), flush=True)


if __name__ == "__main__":
    main()
