"""The demo model: it ships, it answers, and what the README promises of it holds on a sample."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllava

ROOT = Path(__file__).parent.parent
F16 = ROOT / "tests" / "data" / "demo"
SCENE = ROOT / "examples" / "scene.png"
POSTER = ROOT / "examples" / "poster.png"


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava() as model:
        yield model


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyllava", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_the_first_command_of_the_readme() -> None:
    """Its answer is the one printed in the README, stdout carries nothing else, stderr says what model it is."""
    done = run_cli("--image", SCENE, "-p", "What is in the picture?")
    assert done.returncode == 0
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"!\[A drawn scene\]\(examples/scene.png\)\n\n```\n(.*?)\n```", readme, re.DOTALL)
    assert shown is not None
    assert done.stdout == f"{shown[1]}\n"
    assert "demo model" in done.stderr
    assert "encode_image_with_clip: image embedding created: 64 tokens\n" in done.stderr


def test_library_and_command_line_give_the_same_text(demo: pyllava.Llava) -> None:
    assert demo.is_demo
    answer = demo.ask(SCENE, "How many shapes are there?", max_tokens=256)
    assert run_cli("--image", SCENE, "-p", "How many shapes are there?").stdout == f"{answer}\n"


def test_files_are_small() -> None:
    files = list((ROOT / "pyllava" / "models").glob("*.gguf"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < 18e6


def test_a_sample_of_the_table(demo: pyllava.Llava) -> None:
    pytest.importorskip("matplotlib")
    from examples.demo_model import evaluate

    counts = evaluate.grade(lambda image, text: str(demo.ask(image, text)), 4, 25)
    right, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    assert total > 150
    assert right / total >= 0.95, evaluate.table(counts)


def test_the_small_writing_of_its_page() -> None:
    """The 1.6 demo reads what is lost in the 1.5 demo's one view; both answers are printed in the demo's page."""
    page = (ROOT / "examples" / "demo_model" / "README.md").read_text()
    question = "What words are there?"
    shown = dict(re.findall(r"pyllava-cli -m (demo[-.0-9]*) --image examples/poster.png .*?# (.+)", page))
    for name in ("demo", "demo-1.6"):
        done = run_cli("-m", name, "--image", POSTER, "-p", question)
        assert done.returncode == 0
        assert done.stdout == f"{shown[name]}\n"
        assert "demo model" in done.stderr
    assert shown["demo-1.6"] == "dog, cup and bell"


def small_words(**options: Any) -> tuple[int, int]:
    """Right and total on a sample of the table of small writing."""
    from examples.demo_model import evaluate

    with pyllava.Llava(**options) as model:
        counts = evaluate.grade(
            lambda image, text: str(model.ask(image, text)), 4, 20, of=evaluate.EXAMS["writing"]
        )
    right, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return right, total


def test_a_sample_of_the_table_of_small_writing() -> None:
    pytest.importorskip("matplotlib")
    right, total = small_words(model="demo-1.6")
    assert total > 40
    assert right / total >= 0.9
    assert small_words()[0] / total <= 0.1


def test_q8_0_is_close_to_f16() -> None:
    """The files' rounding alone: KL divergence and agreement of the likeliest token."""
    if not F16.is_dir():
        pytest.skip("the f16 pair is kept in the repository only")
    full = pyllava.Llava(F16 / "demo-f16.gguf", F16 / "demo-mmproj-f16.gguf", precision="exact")
    with full, pyllava.Llava(precision="exact") as shipped:
        p, q = (m.logits(SCENE, "Describe the image.").astype(np.float64) for m in (full, shipped))
    p -= p.max(-1, keepdims=True)
    q -= q.max(-1, keepdims=True)
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    divergence = (np.exp(p) * (p - q)).sum(-1).mean()
    assert 0 < divergence < 5e-3
    assert (p.argmax(-1) == q.argmax(-1)).mean() >= 0.95


def test_chat_with_the_demo_model(demo: pyllava.Llava) -> None:
    chat = demo.chat()
    first = chat.ask("Describe the image.", images=SCENE)
    second = chat.ask("How many shapes are there?")
    assert first.text
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert second.text
