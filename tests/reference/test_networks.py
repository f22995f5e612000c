"""Vision tower, projector and decoder against `transformers`, through the whole chain of scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_gguf

import pyllava
from pyllava import images, views

from . import gates
from .cases import CASES, NEXT_CASES, TILES, newline, picture, pinpoints, prompt
from .reference import Reference, Weights, next_pixels, pixels_of, resized, whole_model_logits
from .subject import Subject

pytestmark = pytest.mark.reference

SHAPES = [(70, 40), (33, 61), (56, 56), (1, 9), (300, 17)]


def some_pixels(image_size: int, n: int = 2) -> np.ndarray:
    return np.stack([pixels_of(picture(i, *SHAPES[i]), image_size) for i in range(n)])


@pytest.mark.parametrize("image_size", sorted({case.spec.image_size for case in CASES.values()}))
def test_pixels(image_size: int) -> None:
    spec = views.ImageSpec(image_size)
    for i, shape in enumerate(SHAPES):
        source = picture(i, *shape)
        image = images.load_image(source)
        (view,) = views.pad(image, spec)
        assert np.array_equal(np.asarray(view), resized(source, image_size)), shape
        found = views.preprocess(image, spec).pixels
        gates.check(f"pixels of {shape}", gates.PIXELS, pixels_of(source, image_size)[None], found)


def test_tower_intermediates(exact_pair: Any) -> None:
    pixels = some_pixels(exact_pair.case.spec.image_size, 1)
    gates.check_all(gates.INTERMEDIATE, exact_pair.exact.encode(pixels), exact_pair.subject.encode(pixels))


def test_tower_intermediates_of_five_views(exact_pair: Any) -> None:
    """In one batch, as LLaVA-1.6 has them encoded; the whole and the tiles of one picture."""
    spec = exact_pair.case.spec
    pixels = next_pixels(picture(4, 130, 101), spec.image_size, pinpoints(spec))
    assert len(pixels) == 5
    subject = Subject(exact_pair.files, n_views=5)
    gates.check_all(gates.INTERMEDIATE, exact_pair.exact.encode(pixels), subject.encode(pixels))
    subject.close()


def test_decoder_intermediates(exact_pair: Any) -> None:
    rows = exact_pair.exact.embeddings(some_pixels(exact_pair.case.spec.image_size))
    parts = prompt(exact_pair.case.spec, rows)
    expected, found = exact_pair.exact.run(parts), exact_pair.subject.run(parts)
    logits = expected.pop("logits"), found.pop("logits")
    gates.check_all(gates.INTERMEDIATE, expected, found)
    gates.check("logits", gates.LOGITS, *logits)


def test_tracing_changes_nothing(exact_pair: Any) -> None:
    pixels = some_pixels(exact_pair.case.spec.image_size, 1)
    traced = exact_pair.subject.encode(pixels)["mm.2"]
    assert np.array_equal(traced, exact_pair.subject.session.encode(pixels)[0])


def test_embeddings(pair: Any) -> None:
    pixels = some_pixels(pair.case.spec.image_size)
    found = pair.subject.session.encode(pixels)
    if pair.case.lossless:
        gates.check("embeddings", gates.EMBEDDINGS, pair.exact.embeddings(pixels), found)
    gate = gates.EMBEDDINGS_F16_PATCHES if pair.case.lossless else gates.EMBEDDINGS_F16
    gates.check("embeddings", gate, pair.reference.embeddings(pixels), found)


def test_logits(pair: Any) -> None:
    parts = prompt(pair.case.spec, pair.reference.embeddings(some_pixels(pair.case.spec.image_size)))
    gate = gates.LOGITS if pair.case.lossless else gates.LOGITS_F16
    found = pair.subject.logits(parts)
    gates.check("logits", gate, pair.reference.logits(parts), found)


def test_greedy(exact_pair: Any) -> None:
    """48 tokens: prefill and one decode step per token against no cache at all."""
    parts = prompt(
        exact_pair.case.spec, exact_pair.exact.embeddings(some_pixels(exact_pair.case.spec.image_size))
    )
    assert exact_pair.subject.greedy(parts, 48) == exact_pair.exact.greedy(parts, 48)


def through_llava(llava: pyllava.Llava, reference: Reference, source: np.ndarray, question: str) -> list[Any]:
    """The prompt that `llava` makes, with the reference's rows for the image."""
    rows = reference.embeddings(pixels_of(source, reference.spec.image_size)[None])[0]
    parts: list[Any] = [[]]
    for item in llava.prompt_tokens(source, question):
        if isinstance(item, int):
            parts[-1].append(item)
        else:
            parts += [rows, []]
    return parts


@pytest.mark.parametrize("name", ["gqa", "tied", "heads of 20", "qwen2", "granite"])
def test_llava(name: str, pairs: Callable[[str], Any]) -> None:
    """From a picture to text through the front door."""
    pair, source, question = pairs(name), picture(5, 90, 50), "What is in the picture?"
    with pyllava.Llava(pair.files.model, pair.files.mmproj, n_threads=2) as llava:
        parts = through_llava(llava, pair.exact, source, question)
        gates.check("embeddings", gates.EMBEDDINGS, parts[1], llava.encode_image(source).array)
        gates.check("logits", gates.LOGITS, pair.exact.logits(parts), llava.logits(source, question))
        ids = pair.exact.greedy(parts, 48)
        answer = llava.ask(source, question, max_tokens=48)
        end = ids.index(2) if 2 in ids else len(ids)
        assert list(answer.tokens) == ids[: len(answer.tokens)]
        assert len(answer.tokens) == end or answer.finish_reason == "stop"
        assert answer.text == llava.detokenize(answer.tokens).strip()


@pytest.mark.parametrize("name", ["gqa", "mha", "heads of 12", "qwen2", "granite"])
def test_whole_model(name: str, pairs: Callable[[str], Any]) -> None:
    """transformers' LlavaForConditionalGeneration does the merging; one image in the middle."""
    pair = pairs(name)
    spec, image_token = pair.case.spec, pair.case.spec.n_vocab - 1
    before, after = [1, 20, 300, 21], [40, 9, 310, 77, 5]
    pixels = some_pixels(spec.image_size, 1)
    ids = [*before, *[image_token] * spec.n_patch, *after]
    weights = Weights.of(spec).with_f16_patches()
    expected = whole_model_logits(spec, weights, pixels, ids, image_token)
    found = pair.subject.logits([before, pair.subject.session.encode(pixels)[0], after])
    gates.check("logits", gates.LOGITS, expected, found)


@pytest.mark.parametrize("name", NEXT_CASES)
def test_next(name: str, pairs: Callable[[str], Any], tmp_path: Any) -> None:
    """LLaVA-1.6 through the front door: every grid of tiles, wide, tall, small and square pictures."""
    pair = pairs(name)
    spec, exact, question = pair.case.spec, pair.exact, "What is in the picture?"
    row, resolutions = newline(spec), pinpoints(spec)
    file = tiny_gguf.next_projector(tiny_gguf.read(pair.files.mmproj), resolutions, row)
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", file)
    side = spec.image_size
    shapes = [(columns * side + 1, rows * side - 2) for columns, rows in TILES]
    shapes += [(190, 62), (45, 131), (30, 21), (21, 30), (131, 130), (1, 9), (400, 3)]
    with pyllava.Llava(pair.files.model, mmproj, n_threads=1) as llava:
        for i, shape in enumerate(shapes):
            source = picture(i, *shape)
            rows = exact.next_embeddings(source, resolutions, row)
            gates.check(f"embeddings of {shape}", gates.EMBEDDINGS, rows, llava.encode_image(source).array)
        source = picture(2, *shapes[2])
        parts: list[Any] = [[]]
        for item in llava.prompt_tokens(source, question):
            if isinstance(item, int):
                parts[-1].append(item)
            else:
                parts += [exact.next_embeddings(source, resolutions, row), []]
        gates.check("logits", gates.LOGITS, exact.logits(parts), llava.logits(source, question))
        ids = exact.greedy(parts, 40)
        end = [*ids, 2].index(2)
        assert list(llava.ask(source, question, max_tokens=40).tokens) == ids[:end]
