"""Networks against the numbers that `transformers` gave for the same tiny models (goldens/); no torch is needed.

Checkpoint -> converters -> GGUF -> pyllava, from the picture to the greedy text, in the exact precision: it is the one
that promises the reference's numbers. tests/reference/ does the same live and for more models;
tests/reference/write_goldens.py wrote the files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from reference import gates
from reference.cases import (
    CASES,
    GOLDEN_CASES,
    GOLDEN_PICTURE,
    NEXT_GOLDEN,
    NEXT_GOLDEN_PICTURE,
    Array,
    newline,
    picture,
    pinpoints,
    prompt,
)
from reference.goldens import N_GREEDY, NEXT, fingerprint, part, read_golden, some_rows
from reference.subject import Subject
from tiny import TinySpec

import pyllava
from pyllava import images, views


@dataclass(frozen=True)
class Judged:
    """A model and what the reference says of it."""

    spec: TinySpec
    files: tiny_gguf.Files
    subject: Subject
    golden: dict[str, Array]

    def pixels(self) -> Array:
        image = images.load_image(picture(*GOLDEN_PICTURE))
        return views.preprocess(image, views.ImageSpec(self.spec.image_size)).pixels

    def prompt(self) -> list[list[int] | Array]:
        return prompt(self.spec, [self.subject.session.encode(self.pixels())[0]])


def exact(model: Path, mmproj: Path, n_threads: int) -> pyllava.Llava:
    return pyllava.Llava(model, mmproj, n_threads=n_threads, precision="exact")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Judged]]:
    @functools.cache
    def make(name: str) -> Judged:
        case = CASES[name]
        files = tiny_gguf.convert(tmp_path_factory.mktemp("parity"), case.spec, outtype=case.outtype)
        made.append(Judged(case.spec, files, Subject(files), read_golden(name)))
        return made[-1]

    made: list[Judged] = []
    yield make
    for judged in made:
        judged.subject.close()


@pytest.fixture(params=GOLDEN_CASES)
def judged(request: pytest.FixtureRequest, models: Callable[[str], Judged]) -> Judged:
    return models(request.param)


def test_the_models_are_those_of_the_goldens(judged: Judged) -> None:
    same = np.allclose(fingerprint(judged.spec), judged.golden["fingerprint"], rtol=1e-6)
    assert same, "tests/tiny.py draws other weights: run python -m tests.reference.write_goldens"


def test_tower_intermediates(judged: Judged) -> None:
    found = judged.subject.encode(judged.pixels())
    embeddings = found.pop("mm.2")
    rows = {name: some_rows(x) for name, x in found.items()}
    gates.check_all(gates.INTERMEDIATE, part(judged.golden, "tower/"), rows)
    gates.check("embeddings", gates.EMBEDDINGS, judged.golden["embeddings"], embeddings)


def test_decoder_intermediates(judged: Judged) -> None:
    found = judged.subject.run(judged.prompt())
    logits = some_rows(found.pop("logits"), 8)
    rows = {name: some_rows(x) for name, x in found.items()}
    gates.check_all(gates.INTERMEDIATE, part(judged.golden, "decoder/"), rows)
    gates.check("logits", gates.LOGITS, judged.golden["logits"], logits)


def test_greedy(judged: Judged) -> None:
    assert judged.subject.greedy(judged.prompt(), N_GREEDY) == judged.golden["greedy"].tolist()


def test_llava(judged: Judged) -> None:
    """The same embeddings through the front door, whatever the threads and however the picture comes."""
    source = picture(*GOLDEN_PICTURE)
    for n_threads in (1, 3):
        with exact(judged.files.model, judged.files.mmproj, n_threads) as llava:
            found = llava.encode_image(source).array
            gates.check("embeddings", gates.EMBEDDINGS, judged.golden["embeddings"], found)


def test_next(models: Callable[[str], Judged], tmp_path: Path) -> None:
    """LLaVA-1.6: a picture in five views."""
    judged, golden = models(NEXT_GOLDEN), read_golden(NEXT)
    spec, source = judged.spec, picture(*NEXT_GOLDEN_PICTURE)
    assert np.allclose(fingerprint(spec), golden["fingerprint"], rtol=1e-6)
    file = tiny_gguf.next_projector(tiny_gguf.read(judged.files.mmproj), pinpoints(spec), newline(spec))
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", file)
    for n_threads in (1, 3):
        with exact(judged.files.model, mmproj, n_threads) as llava:
            rows = llava.encode_image(source).array
            gates.check("embeddings", gates.EMBEDDINGS, golden["embeddings"], rows)
    parts = prompt(spec, [rows])
    gates.check("logits", gates.LOGITS, golden["logits"], some_rows(judged.subject.logits(parts), 8))
    assert judged.subject.greedy(parts, N_GREEDY) == golden["greedy"].tolist()


def test_a_wrong_intermediate_is_named(judged: Judged) -> None:
    """The comparison itself can fail, and says where."""
    expected = part(judged.golden, "decoder/")
    wrong = {name: x + 0.01 * (name.startswith("blk.1.")) for name, x in expected.items()}
    with pytest.raises(AssertionError, match=r"first wrong intermediate: blk\.1\."):
        gates.check_all(gates.INTERMEDIATE, expected, wrong)
    with pytest.raises(AssertionError, match="only one side"):
        gates.check_all(gates.INTERMEDIATE, expected, {})
