"""LLaVA-1.6: pictures in tiles, and the rows that they become."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import pyllava
from pyllava import _lib, models
from pyllava.images import load_image
from pyllava.views import ImageSpec, best_resolution, preprocess, tile_grid

SEED_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SPEC = ImageSpec(336, aspect="anyres", pinpoints=SEED_PINPOINTS)
SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 3000))
EXTREMES = [(1, 1), (4000, 1), (1, 3000), (4000, 3000), (3999, 2), (7, 2999), (336, 336), (337, 336)]

# Tokens of a picture (width, height) with CLIP-L/336 and the five resolutions of every LLaVA-1.6.
COUNTS = {
    (224, 224): 1176,
    (336, 336): 1176,
    (337, 336): 1176,
    (672, 336): 1752,
    (336, 672): 1776,
    (672, 672): 2928,
    (1000, 1000): 2928,
    (640, 480): 2340,
    (800, 600): 2340,
    (1024, 768): 2340,
    (480, 640): 2352,
    (1920, 1080): 1948,
    (1080, 1920): 1968,
    (1000, 300): 2182,
    (300, 1000): 2232,
    (1344, 336): 1890,
    (2000, 200): 1160,
    (200, 2000): 1224,
}


# --- the original procedure, step by step, on whole pictures ---


def chosen(size: tuple[int, int], resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    best, most, least = resolutions[0], -1, 0
    for resolution in resolutions:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = resolution[0] * resolution[1] - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = resolution, effective, wasted
    return best


def views_of(image: Image.Image, side: int, resolutions: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    (width, height), (full_width, full_height) = image.size, chosen(image.size, resolutions)
    scale_w, scale_h = full_width / width, full_height / height
    if scale_w < scale_h:
        new = full_width, min(math.ceil(height * scale_w), full_height)
    else:
        new = min(math.ceil(width * scale_h), full_width), full_height
    full = np.zeros((full_height, full_width, 3), np.uint8)
    left, top = (full_width - new[0]) // 2, (full_height - new[1]) // 2
    full[top : top + new[1], left : left + new[0]] = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    tiles = [
        full[y : y + side, x : x + side]
        for y in range(0, full_height, side)
        for x in range(0, full_width, side)
    ]
    return [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)), *tiles]


def merged(
    views: np.ndarray, newline: np.ndarray, size: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Views [1 + tiles, patches, E] as LLaVA-NeXT packs them."""
    (columns, rows), width = grid, views.shape[-1]
    if columns == 0:
        return np.concatenate([views[0], newline[None]])
    side = math.isqrt(views.shape[1])
    whole = views[1:].reshape(rows, columns, side, side, width).swapaxes(1, 2)
    whole = whole.reshape(rows * side, columns * side, width)
    high, wide = whole.shape[:2]
    if size[0] / size[1] > wide / high:
        new = int(round(size[1] * (wide / size[0]), 7))
        cut = (high - new) // 2
        whole = whole[cut : high - cut]
    else:
        new = int(round(size[0] * (high / size[1]), 7))
        cut = (wide - new) // 2
        whole = whole[:, cut : wide - cut]
    lines = np.broadcast_to(newline, (len(whole), 1, width))
    return np.concatenate([views[0], np.concatenate([whole, lines], 1).reshape(-1, width)])


# --- pixels ---


@settings(max_examples=400, deadline=None)
@given(SIZES)
@example((337, 336))
@example((504, 672))
@example((1, 1))
def test_best_resolution(size: tuple[int, int]) -> None:
    assert best_resolution(size, SEED_PINPOINTS) == chosen(size, SEED_PINPOINTS)
    columns, rows = tile_grid(size, SPEC)
    assert (columns * 336, rows * 336) == chosen(size, SEED_PINPOINTS)


def test_a_tie_goes_to_the_first() -> None:
    assert best_resolution((336, 336), SEED_PINPOINTS) == (336, 672)
    assert best_resolution((336, 336), tuple(reversed(SEED_PINPOINTS))) == (672, 336)


@settings(max_examples=25, deadline=None)
@given(SIZES)
@example((1, 1))
@example((4000, 1))
@example((1, 3000))
@example((3999, 2))
@example((1009, 335))
def test_pixels_are_those_of_the_original_procedure(size: tuple[int, int]) -> None:
    random = np.random.RandomState(size[0] * 3001 + size[1])
    image = load_image(random.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    pinpoints = tuple((w // 3, h // 3) for w, h in SEED_PINPOINTS)  # as many tiles, a ninth of the work
    spec = ImageSpec(112, aspect="anyres", pinpoints=pinpoints)
    views = preprocess(image, spec)
    expected = views_of(image, 112, pinpoints)
    mean, std = (np.array(x, np.float64)[:, None, None] for x in (spec.mean, spec.std))
    pixels = np.stack([(view.transpose(2, 0, 1) / 255 - mean) / std for view in expected])
    assert views.pixels.shape == pixels.shape
    assert views.grid[0] * views.grid[1] + 1 == len(expected)
    found = np.rint((views.pixels.astype(np.float64) * std + mean) * 255).astype(np.uint8)
    assert np.array_equal(found.transpose(0, 2, 3, 1), np.stack(expected))
    assert np.abs(views.pixels - pixels).max() < 1e-6


def test_without_pinpoints_the_whole_picture_alone() -> None:
    image = load_image(np.zeros((50, 90, 3), np.uint8))
    views = preprocess(image, ImageSpec(112, aspect="anyres"))
    assert views.pixels.shape == (1, 3, 112, 112)
    assert views.grid == (0, 0)


@pytest.mark.parametrize("pinpoints", [((336, 0),), ((336, 100),), ((-336, 336),)])
def test_pinpoints_must_be_multiples(pinpoints: Any) -> None:
    with pytest.raises(ValueError, match="multiples of 336"):
        ImageSpec(336, aspect="anyres", pinpoints=pinpoints)


# --- rows ---

E = 5
Merge = Callable[[np.ndarray, _lib.Layout], np.ndarray]


def anyres_file(path: Path, pinpoints: Any, newline: np.ndarray | None, **keys: Any) -> Path:
    """The demo model's projector as one of LLaVA-1.6."""
    kinds = tiny_gguf.gguf.GGUFValueType
    demo = models.find(None, None).mmproj
    assert demo is not None
    file = tiny_gguf.read(demo)
    file.keys["clip.vision.mm_patch_merge_type"] = ("spatial_unpad", kinds.STRING, None)
    file.keys["clip.vision.image_aspect_ratio"] = ("anyres", kinds.STRING, None)
    if pinpoints:
        sides = [side for pinpoint in pinpoints for side in pinpoint]
        file.keys["clip.vision.image_grid_pinpoints"] = (sides, kinds.ARRAY, kinds.INT32)
    for key, value in keys.items():
        name = f"clip.vision.{key}"
        file.keys[name] = (
            (value, kinds.STRING, None) if isinstance(value, str) else (value, kinds.ARRAY, kinds.INT32)
        )
    if newline is not None:
        file = file.with_tensors({"model.image_newline": tiny_gguf.f32(newline)})
    return tiny_gguf.write(path, file)


PINPOINTS = ((112, 224), (224, 112), (224, 224), (336, 112), (112, 336))


def newline_of(n_embd: int) -> np.ndarray:
    return np.random.RandomState(3).randn(n_embd).astype(np.float32)


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pyllava.Llava() as demo:
        newline = newline_of(demo.n_embd)
    return anyres_file(tmp_path_factory.mktemp("anyres") / "mmproj.gguf", PINPOINTS, newline)


def opened(mmproj: Path, **options: Any) -> pyllava.Llava:
    return pyllava.Llava(models.find(None, None).model, mmproj, n_threads=1, **options)


@pytest.fixture(scope="module")
def llava(mmproj: Path) -> Iterator[pyllava.Llava]:
    with opened(mmproj, precision="exact") as llava:  # a view's rows are the same alone and among others
        yield llava


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(SIZES)
@example((4000, 1))
@example((1, 3000))
@example((224, 224))
@example((223, 224))
@example((27, 1000))
def test_rows_are_those_of_the_original_procedure(llava: pyllava.Llava, size: tuple[int, int]) -> None:
    info = llava.info
    spec = ImageSpec(info.image_size, aspect="anyres", pinpoints=info.pinpoints)
    grid = tile_grid(size, spec)
    shape = (1 + grid[0] * grid[1], info.n_image_tokens, info.n_embd)
    views = np.random.RandomState(size[0]).randn(*shape).astype(np.float32)
    layout = _lib.Layout(grid, size, flat=False)
    rows = llava._model.merge(layout, views)
    expected = merged(views, newline_of(info.n_embd), size, grid)
    assert llava._model.merge_length(layout) == len(expected)
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize("size", list(COUNTS))
def test_counts_of_the_seed_s_models(size: tuple[int, int]) -> None:
    """Without a model of that size at hand: the same procedure on views of one number a patch."""
    grid = tile_grid(size, SPEC)
    views = np.zeros((1 + grid[0] * grid[1], 576, 1))
    assert len(merged(views, np.zeros(1), size, grid)) == COUNTS[size]


def test_flat_is_the_raster_of_all_tiles(mmproj: Path) -> None:
    with opened(mmproj, image_merge="flat") as llava:
        info, picture = llava.info, noise(200, 90)
        grid = tile_grid((200, 90), ImageSpec(info.image_size, aspect="anyres", pinpoints=info.pinpoints))
        assert grid == (2, 1)
        views = np.arange(3 * 64, dtype=np.float32).reshape(3, 64, 1).repeat(info.n_embd, 2)
        rows = llava._model.merge(_lib.Layout(grid, (200, 90), flat=True), views)[:, 0]
        tiles = views[1:, :, 0].reshape(2, 8, 8)
        assert np.array_equal(rows, np.concatenate([views[0, :, 0], np.concatenate(list(tiles), 1).ravel()]))
        assert len(llava.encode_image(picture)) == 3 * 64


def test_the_picture_reaches_the_model(llava: pyllava.Llava) -> None:
    """Encoded in one batch, merged, counted, answered."""
    picture = noise(200, 130)
    embedding = llava.encode_image(picture)
    assert llava._pictures.spec is not None
    views = preprocess(load_image(picture), llava._pictures.spec)
    features = llava._session.encode(views.pixels)
    assert np.array_equal(embedding.array, merged(features, newline_of(llava.n_embd), (200, 130), views.grid))
    one_by_one = np.concatenate([llava._session.encode(view[None]) for view in views.pixels])
    assert np.abs(features - one_by_one).max() < 1e-4
    answer = llava.ask(picture, "What is this?", max_tokens=4)
    assert answer.usage.image_tokens_each == (len(embedding),)


@pytest.mark.parametrize(("most", "tiles"), [(0, 0), (1, 0), (2, 2), (3, 3), (4, 4), (99, 4)])
def test_max_tiles(mmproj: Path, most: int, tiles: int) -> None:
    with opened(mmproj, image_max_tiles=most) as llava:
        length = len(llava.encode_image(noise(224, 224)))
        assert length == {0: 65, 2: 64 + 8 * 9, 3: 64 + 8 * 9, 4: 64 + 16 * 17}[tiles]


def test_rows_from_elsewhere_are_not_taken_for_the_picture_s_own(mmproj: Path) -> None:
    """An embedding that another model, or one with other options, made of a picture that this one knows."""
    picture, question = noise(200, 130), "What is this?"
    with opened(mmproj) as llava, opened(mmproj, image_merge="flat") as flat, pyllava.Llava() as demo:
        own = llava.encode_image(picture)
        for other in (flat, demo):
            foreign = dataclasses.replace(other.encode_image(picture), projector=None)  # as one made by hand
            assert foreign.key != own.key
            llava.ask(own, question, max_tokens=1)
            answer = llava.ask(foreign, question, max_tokens=1)
            assert answer.usage.cached_tokens < answer.usage.text_tokens


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="image_merge"):
        pyllava.Llava(image_merge="mean")
    with pytest.raises(ValueError, match="image_max_tiles"):
        pyllava.Llava(image_max_tiles=-1)
    with pytest.raises(TypeError):
        pyllava.Llava(image_max_tiles=1.5)  # type: ignore[arg-type]


def test_overflow_comes_before_any_computing(mmproj: Path) -> None:
    stages = []
    with opened(mmproj, n_ctx=300, progress=lambda stage, _: stages.append(stage)) as llava:
        stages.clear()
        with pytest.raises(pyllava.ContextOverflowError) as error:
            llava.ask(noise(224, 224), "What is this?")
        assert not stages
        for words in ("336 of images", "n_ctx=300", "(-c) to", "--image-max-tiles"):
            assert words in str(error.value)
        wanted = int(str(error.value).split("(-c) to ")[1].split()[0])
    with opened(mmproj, n_ctx=wanted) as llava:
        assert len(llava.ask(noise(224, 224), "What is this?").tokens) == 1
    with opened(mmproj, n_ctx=300, image_max_tiles=3) as llava:
        llava.ask(noise(224, 224), "What is this?", max_tokens=2)


def test_one_five_ignores_the_options() -> None:
    with pyllava.Llava(image_merge="flat", image_max_tiles=0) as llava:
        assert len(llava.encode_image(noise(224, 224))) == llava.info.n_image_tokens
        with pytest.raises(ValueError, match="no newline"):
            llava._model.merge_length(_lib.Layout((1, 1), (5, 5), flat=False))


@pytest.mark.parametrize(
    ("pinpoints", "newline", "keys", "words"),
    [
        (PINPOINTS, False, {}, "no tensor model.image_newline"),
        ((), True, {}, "lists no clip.vision.image_grid_pinpoints"),
        (PINPOINTS, True, {"mm_patch_merge_type": "maxpool2x2"}, "'maxpool2x2'"),
        (PINPOINTS, True, {"mm_patch_merge_type": "flat"}, "not spatial_unpad"),
        (PINPOINTS, True, {"image_aspect_ratio": "anyres_max_"}, "'anyres_max_'"),
        (PINPOINTS, True, {"image_aspect_ratio": "anyres_max_0"}, "'anyres_max_0'"),
        (PINPOINTS, True, {"image_aspect_ratio": "anyres_max_9x"}, "'anyres_max_9x'"),
        (PINPOINTS, True, {"image_aspect_ratio": "anyres_max_1234"}, "'anyres_max_1234'"),
        (PINPOINTS, True, {"image_aspect_ratio": "highres"}, "'highres'"),
        (((112, 100),), True, {}, "found 112 x 100"),
        (((112, -112),), True, {}, "found 112 x -112"),
        (((112 * 65, 112),), True, {}, "at most 64 tiles"),
        ((), True, {"image_grid_pinpoints": [112, 112, 112]}, "need pairs"),
        (((112, 112),) * 65, True, {}, "image_grid_pinpoints"),
    ],
)
def test_files_that_contradict_themselves(
    tmp_path: Path, pinpoints: Any, newline: bool, keys: Any, words: str
) -> None:
    with pyllava.Llava() as demo:
        row = newline_of(demo.n_embd) if newline else None
    path = anyres_file(tmp_path / "mmproj.gguf", pinpoints, row, **keys)
    with pytest.raises(pyllava.PyllavaError, match=r"mmproj\.gguf") as error:
        opened(path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("patch_size", "words"),
    [(4, "2048 patches a side, at most 1024"), (8, "found 16384 x 24576"), (0, "patch_size")],
)
def test_sizes_beyond_all_pictures(tmp_path: Path, patch_size: int, words: str) -> None:
    """More rows than 32 bits count, more pixels than a canvas should have."""
    kinds = tiny_gguf.gguf.GGUFValueType
    file = tiny_gguf.read(anyres_file(tmp_path / "small.gguf", ((2 * 8192, 3 * 8192),), None))
    file.keys["clip.vision.image_size"] = (8192, kinds.UINT32, None)
    file.keys["clip.vision.patch_size"] = (patch_size, kinds.UINT32, None)
    with pytest.raises(pyllava.PyllavaError, match=words):
        opened(tiny_gguf.write(tmp_path / "mmproj.gguf", file))


def test_newline_of_the_wrong_width(tmp_path: Path) -> None:
    with pytest.raises(pyllava.ModelMismatchError, match="image_newline"):
        opened(anyres_file(tmp_path / "mmproj.gguf", PINPOINTS, np.zeros(7, np.float32)))


def test_pinpoints_filled_up_with_zeros(tmp_path: Path, llava: pyllava.Llava) -> None:
    row = newline_of(llava.n_embd)
    sides = [side for pinpoint in PINPOINTS for side in pinpoint] + [0] * 22
    with opened(anyres_file(tmp_path / "mmproj.gguf", (), row, image_grid_pinpoints=sides)) as other:
        assert other.info.pinpoints == PINPOINTS
