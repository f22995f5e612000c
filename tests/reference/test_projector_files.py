"""Projector files of every generation give the same embeddings: what is in a file tells what it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from tiny import TinySpec
from tiny_gguf import Files, Gguf

import pyllava

from . import gates
from .cases import Case, newline, picture, pinpoints
from .conftest import Pair, make_pair
from .subject import Subject

pytestmark = pytest.mark.reference

SPEC = TinySpec(v_layer=4, image_size=28, seed=20)
NEWLINE = tiny_gguf.f32(np.full(SPEC.n_embd, 7.0))


def swapped(file: Gguf) -> Gguf:
    """The two names of the feed-forward layers exchanged: from legacy to new, or back."""
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return file.renamed(lambda name: re.sub("ffn_up|ffn_down", lambda m: other[m[0]], name))


def one_layer_dropped(file: Gguf) -> Gguf:
    """As the legacy converter writes: the last layer is gone, block_count counts the rest, nothing says so."""
    last = f"v.blk.{SPEC.v_layer - 1}."
    file = file.renamed(lambda name: None if name.startswith(last) else name)
    return file.without_keys("clip.vision.feature_layer").with_u32(clip__vision__block_count=SPEC.v_layer - 1)


def post_norm_added(file: Gguf) -> Gguf:
    ones = tiny_gguf.f32(np.full(SPEC.v_embd, 3.0))
    return file.with_tensors({"v.post_ln.weight": ones, "v.post_ln.bias": ones})


def f32_patches(file: Gguf) -> Gguf:
    patches = file.tensors["v.patch_embd.weight"]
    return file.with_tensors({"v.patch_embd.weight": tiny_gguf.f32(patches.floats())})


def first_generation(file: Gguf) -> Gguf:
    """2023: 18 keys, no projector type."""
    return one_layer_dropped(file).without_keys("clip.projector_type", "general.type")


GENERATIONS: dict[str, Callable[[Gguf], Gguf]] = {
    "as converted": lambda f: f,
    "other ffn names": swapped,
    "no projector type": lambda f: f.without_keys("clip.projector_type"),
    "one layer dropped": one_layer_dropped,
    "model.image_newline": lambda f: f.with_tensors({"model.image_newline": NEWLINE}),
    "v.image_newline": lambda f: f.with_tensors({"v.image_newline": NEWLINE}),
    "both newlines": lambda f: f.with_tensors({"v.image_newline": NEWLINE, "model.image_newline": NEWLINE}),
    "post norm stored": post_norm_added,
    "f32 patches": f32_patches,
    "2023": first_generation,
    "2023, new ffn names and a newline": lambda f: swapped(
        first_generation(f).with_tensors({"model.image_newline": NEWLINE})
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pair = make_pair(tmp_path_factory.mktemp("generations"), Case(SPEC))
    yield pair
    pair.subject.close()


def pixels() -> np.ndarray:
    return np.random.RandomState(1).randn(1, 3, SPEC.image_size, SPEC.image_size).astype(np.float32)


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_generation(generation: str, pair: Pair, tmp_path: Path) -> None:
    file = tiny_gguf.write(
        tmp_path / "mmproj.gguf", GENERATIONS[generation](tiny_gguf.read(pair.files.mmproj))
    )
    subject = Subject(Files(pair.files.model, file))
    assert subject.model.info.n_layer_vision_run == SPEC.v_layer - 1
    found = subject.session.encode(pixels())
    gates.check(generation, gates.EMBEDDINGS, pair.exact.embeddings(pixels()), found)
    assert np.array_equal(found, pair.subject.session.encode(pixels()))
    subject.close()


def new_newline_name(file: Gguf) -> Gguf:
    return file.renamed(lambda name: name.replace("model.image_newline", "v.image_newline"))


NEXT_GENERATIONS: dict[str, Callable[[Gguf], Gguf]] = {
    "as converted": lambda f: f,
    "other ffn names": swapped,
    "one layer dropped": one_layer_dropped,
    "no projector type": lambda f: f.without_keys("clip.projector_type"),
    "v.image_newline": new_newline_name,
    "both newlines": lambda f: f.with_tensors({"v.image_newline": f.tensors["model.image_newline"]}),
    "no aspect ratio": lambda f: f.without_keys("clip.vision.image_aspect_ratio"),
    "f32 patches": f32_patches,
    "post norm stored": post_norm_added,
    "2024": lambda f: one_layer_dropped(f).without_keys("general.type"),
    "2025, written anew": lambda f: new_newline_name(swapped(f)),
}


@pytest.mark.parametrize("generation", list(NEXT_GENERATIONS))
def test_generation_of_1_6(generation: str, pair: Pair, tmp_path: Path) -> None:
    row, resolutions = newline(SPEC), pinpoints(SPEC)
    file = tiny_gguf.next_projector(tiny_gguf.read(pair.files.mmproj), resolutions, row)
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", NEXT_GENERATIONS[generation](file))
    with pyllava.Llava(pair.files.model, mmproj, n_threads=1) as llava:
        assert llava.info.pinpoints == resolutions
        assert llava.info.n_layer_vision_run == SPEC.v_layer - 1
        for shape in ((90, 31), (23, 65), (61, 60), (9, 13)):
            expected = pair.exact.next_embeddings(picture(1, *shape), resolutions, row)
            gates.check(generation, gates.EMBEDDINGS, expected, llava.encode_image(picture(1, *shape)).array)


@pytest.mark.parametrize("keep", [23, 24])
def test_towers_that_do_not_say_which_layer(keep: int, tmp_path: Path) -> None:
    """CLIP-L has 24 layers and LLaVA wants 23: 23 stored ones are those, of 24 the last is left out."""
    spec = replace(SPEC, v_layer=24, v_ff=40, seed=21)
    pair = make_pair(tmp_path, Case(spec))
    file = tiny_gguf.read(pair.files.mmproj).without_keys("clip.vision.feature_layer")
    if keep == 23:
        file = file.renamed(lambda name: None if name.startswith("v.blk.23.") else name)
        file = file.with_u32(clip__vision__block_count=23)
    subject = Subject(Files(pair.files.model, tiny_gguf.write(tmp_path / "mmproj.gguf", file)))
    found = subject.session.encode(pixels())
    gates.check(f"{keep} layers", gates.EMBEDDINGS, pair.exact.embeddings(pixels()), found)
    subject.close()
    pair.subject.close()


@pytest.mark.parametrize(("select", "n_run"), [(-1, 4), (-3, 2)])
def test_other_feature_layers(select: int, n_run: int, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, Case(replace(SPEC, select_layer=select)))
    assert pair.subject.model.info.n_layer_vision_run == n_run
    found = pair.subject.session.encode(pixels())
    gates.check("embeddings", gates.EMBEDDINGS, pair.exact.embeddings(pixels()), found)
    pair.subject.close()
