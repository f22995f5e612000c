"""Looking inside: embeddings in files, their cache, what a model sees, tokens in colours, and what notebooks show."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import math
import os
import pickle
import re
import shlex
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from PIL import Image
from test_anyres import anyres_file

import pyllava
from pyllava import _token_colors, cli, models
from pyllava._projector import projector_of
from pyllava.answer import Answer, Timings, TokenLogprob, Usage
from pyllava.images import load_image
from pyllava.view import view_of
from pyllava.views import ImageSpec, anyres, pad, squash

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"
QUESTION = "What color is the star?"
SUFFIXES = (".npz", ".safetensors")


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def tiled() -> Iterator[pyllava.Llava]:
    with pyllava.Llava("demo-1.6", n_threads=1) as model:
        yield model


def noise(width: int, height: int) -> Image.Image:
    random = np.random.RandomState(width * height)
    return Image.fromarray(random.randint(0, 256, (height, width, 3)).astype(np.uint8))


# --- embeddings in files ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_embedding_comes_back_from_a_file_and_answers_as_the_picture(
    demo: pyllava.Llava, tmp_path: Path, suffix: str
) -> None:
    made, path = demo.encode_image(SCENE), tmp_path / f"scene{suffix}"
    made.save(path)
    loaded = pyllava.ImageEmbedding.load(path)
    assert np.array_equal(loaded.array, made.array)
    assert loaded.array.dtype == np.float32
    assert (loaded.size, loaded.key, loaded.layout) == (made.size, made.key, made.layout)
    assert loaded.projector == made.projector == projector_of(models.find(None, None).mmproj or "")
    expected = demo.ask(SCENE, QUESTION).tokens
    chat = demo.chat()
    assert demo.ask(loaded, QUESTION).tokens == expected
    assert chat.ask(QUESTION, images=loaded).tokens == expected
    assert [result.answers[0].tokens for result in demo.batch([loaded, made], QUESTION)] == [expected] * 2
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_files_are_what_other_programs_read(demo: pyllava.Llava, tmp_path: Path) -> None:
    made = demo.encode_image(SCENE)
    made.save(tmp_path / "a.npz")
    made.save(tmp_path / "a.safetensors")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["array"], made.array)
        about = json.loads(bytes(file["about"]))
    assert about["size"] == [336, 336]
    assert about["projector"]["name"] == "demo-mmproj-q8_0.gguf"
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("array"), made.array)
        assert json.loads(file.metadata()["pyllava"]) == about


def test_the_layout_of_tiles_is_kept(tiled: pyllava.Llava, tmp_path: Path) -> None:
    made = tiled.encode_image(noise(300, 100))
    made.save(tmp_path / "a.npz")
    layout = pyllava.ImageEmbedding.load(tmp_path / "a.npz").layout
    assert layout is not None
    assert (layout.grid, layout.size, layout.flat) == ((3, 1), (300, 100), False)


def test_pooled_is_the_mean_of_the_rows(demo: pyllava.Llava) -> None:
    made = demo.encode_image(SCENE)
    pooled = made.pooled()
    assert pooled.dtype == np.float32
    assert np.allclose(pooled, made.array.astype(np.float64).sum(axis=0) / 64, rtol=1e-6, atol=1e-6)


def test_an_embedding_of_another_model_is_refused(demo: pyllava.Llava, tiled: pyllava.Llava) -> None:
    """Of the same width: nothing else would tell."""
    made = demo.encode_image(SCENE)
    assert demo.n_embd == tiled.n_embd
    words = r"of the projector demo-mmproj-q8_0\.gguf \(\w{8}\): that of .*demo-1\.6-q8_0\.gguf is demo-1\.6-mmproj"
    for ask in (
        lambda: tiled.ask(made, QUESTION),
        lambda: tiled.chat().ask(QUESTION, images=made),
        lambda: tiled.chat().add("Q", "A", made),
        lambda: tiled.logits(made, QUESTION),
        lambda: tiled.encode_image(made),
    ):
        with pytest.raises(pyllava.ModelMismatchError, match=words):
            ask()
    (result,) = tiled.batch([made], QUESTION)
    assert isinstance(result.error, pyllava.ModelMismatchError)
    by_hand = dataclasses.replace(made, projector=None)  # its maker is not known: its width has to fit
    assert tiled.ask(by_hand, QUESTION, max_tokens=1).tokens
    with pytest.raises(pyllava.ModelMismatchError, match=r"shape \(64, 255\): .*takes \(n, 256\)"):
        tiled.ask(dataclasses.replace(by_hand, array=made.array[:, 1:]), QUESTION)


def test_an_embedding_without_rows_is_refused(demo: pyllava.Llava) -> None:
    with pytest.raises(pyllava.ModelMismatchError, match=r"shape \(0, 256\): .* n from 1 on"):
        demo.ask(pyllava.ImageEmbedding(np.zeros((0, 256), np.float32), (8, 8), 1), "What is it?")


@pytest.mark.parametrize(("n_images", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_view_of_how_many(demo: pyllava.Llava, n_images: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        demo.view(SCENE, n_images=n_images)


def test_an_embedding_is_refused_without_a_projector(tmp_path: Path, demo: pyllava.Llava) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(demo.files.model.read_bytes())
    with (
        pyllava.Llava(alone) as model,
        pytest.raises(pyllava.ModelMismatchError, match=r"alone\.gguf has none"),
    ):
        model.ask(demo.encode_image(SCENE), QUESTION)


def test_a_projector_is_told_by_its_weights_and_settings_and_not_by_its_file(tmp_path: Path) -> None:
    source = models.find(None, None).mmproj
    assert source is not None
    file, digest = tiny_gguf.read(source), projector_of(source).digest
    assert projector_of(tiny_gguf.write(tmp_path / "other-name.gguf", file)).digest == digest
    file.keys["general.name"] = ("Another title", tiny_gguf.gguf.GGUFValueType.STRING, None)
    assert projector_of(tiny_gguf.write(tmp_path / "title.gguf", file)).digest == digest
    changed = file.with_u32(clip__vision__image_size=126)
    assert projector_of(tiny_gguf.write(tmp_path / "setting.gguf", changed)).digest != digest
    for name in ("mm.0.bias", "v.blk.0.attn_q.weight"):
        data = np.array(file.tensors[name].data)
        data.view(np.uint8).reshape(-1)[::2] ^= 1
        trained = file.with_tensors({name: dataclasses.replace(file.tensors[name], data=data)})
        assert projector_of(tiny_gguf.write(tmp_path / f"{name}.gguf", trained)).digest != digest


@pytest.fixture(scope="module")
def saved(demo: pyllava.Llava, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a small embedding, by suffix."""
    folder = tmp_path_factory.mktemp("saved")
    small = dataclasses.replace(demo.encode_image(SCENE), array=np.arange(12, dtype=np.float32).reshape(3, 4))
    for suffix in SUFFIXES:
        small.save(folder / f"a{suffix}")
    return {suffix: (folder / f"a{suffix}").read_bytes() for suffix in SUFFIXES}


def loaded(folder: Path, suffix: str, data: bytes) -> pyllava.ImageEmbedding | None:
    """What is made of a file's bytes; None where they are refused as they should be."""
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    error: Exception | None = None
    try:
        return pyllava.ImageEmbedding.load(path)
    except pyllava.ImageError as refused:
        error = refused
    assert str(error).startswith(str(path))
    assert "\n" not in str(error)
    return None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_cut_or_damaged(saved: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    """Cut anywhere it is refused; with one byte changed it is refused, or sound rows with a key of their own."""
    data = saved[suffix]
    assert loaded(tmp_path, suffix, data) is not None
    for n in range(0, len(data), 7):
        assert loaded(tmp_path, suffix, data[:n]) is None
    random = np.random.RandomState(0)
    for at in random.randint(0, len(data), 400):
        changed = bytearray(data)
        changed[at] ^= 1 << random.randint(8)
        found = loaded(tmp_path, suffix, bytes(changed))
        assert found is None or (found.array.shape == (3, 4) and np.isfinite(found.array).all())


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def npz_file(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


ROWS = np.zeros((2, 2), np.float32)
ABOUT = npy(np.frombuffer(b"{}", np.uint8))
HOSTILE = {
    "empty": (".npz", b""),
    "pickle": (".npz", pickle.dumps(_Evil())),
    "pickled array": (
        ".npz",
        npz_file(array=npy(np.array([_Evil()], object), allow_pickle=True), about=ABOUT),
    ),
    "compressed": (
        ".npz",
        npz_file(zipfile.ZIP_DEFLATED, array=npy(np.zeros((9999, 99), np.float32)), about=ABOUT),
    ),
    "no object": (".npz", npz_file(array=npy(ROWS), about=npy(np.frombuffer(b"[]", np.uint8)))),
    "nothing told": (".npz", npz_file(array=npy(ROWS), about=ABOUT)),
    "doubles": (".npz", npz_file(array=npy(ROWS.astype(np.float64)), about=ABOUT)),
    "order of Fortran": (
        ".npz",
        npz_file(array=npy(np.asfortranarray(np.ones((3, 2), np.float32))), about=ABOUT),
    ),
    "huge shape": (".npz", npz_file(array=npy(ROWS).replace(b"(2, 2)", b"(1<<9)"), about=ABOUT)),
    "huge numbers": (".npz", npz_file(array=npy(ROWS).replace(b"(2, 2), ", b"(2**60,)"), about=ABOUT)),
    "long header": (".safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "deep header": (".safetensors", safetensors_file(b"[" * 100_000)),
    "no tensor": (".safetensors", safetensors_file({})),
    "shape of texts": (
        ".safetensors",
        safetensors_file({"array": {"dtype": "F32", "shape": ["1", 1], "data_offsets": [0, 4]}}, b"1234"),
    ),
    "negative shape": (
        ".safetensors",
        safetensors_file({"array": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
    ),
    "outside": (
        ".safetensors",
        safetensors_file({"array": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]}}, b"1234"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, *HOSTILE[name]) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "cat"}, "found 'cat'"),
        ({"version": 2}, "version 2, need version 1"),
        ({"size": [0, 5]}, "need two numbers from 1 on"),
        ({"size": [1e3, 5]}, "need two numbers"),
        ({"size": 7}, "cannot unpack"),
        ({"layout": {"grid": [-1, 2], "flat": True}}, "need two numbers from 0 on"),
        ({"layout": {}}, "grid"),
        ({"projector": {"name": "x", "digest": "ab"}}, "a digest of 2 digits, need 32"),
    ],
)
def test_files_that_tell_nonsense(
    saved: dict[str, bytes], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with np.load(io.BytesIO(saved[".npz"])) as file:
        about = {**json.loads(bytes(file["about"])), **change}
        np.savez(
            tmp_path / "a.npz", array=file["array"], about=np.frombuffer(json.dumps(about).encode(), np.uint8)
        )
    with pytest.raises(pyllava.ImageError, match=re.escape(words)):
        pyllava.ImageEmbedding.load(tmp_path / "a.npz")


def test_rows_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    rows = np.zeros((3, 4), np.float32)
    rows[1, 1] = 0.3
    file = tmp_path / "a.safetensors"
    pyllava.ImageEmbedding(rows, (5, 5), 1).save(file)
    file.write_bytes(file.read_bytes().replace(rows[1, 1].tobytes(), np.float32(np.nan).tobytes()))
    with pytest.raises(pyllava.ImageError, match="NaN or infinite"):
        pyllava.ImageEmbedding.load(file)


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (np.full((1, 2), np.nan, np.float32), (1, 1)),
        (np.zeros((0, 2), np.float32), (1, 1)),
        (np.zeros(2, np.float32), (1, 1)),
        (np.zeros((1, 2), np.float32), (0, 1)),
        (np.zeros((1, 2), np.float32), (1, 2**31)),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, array: Any, size: tuple[int, int]
) -> None:
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(ValueError, match="need"):
            pyllava.ImageEmbedding(array, size, 1).save(tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


def test_sizes_of_numpy_are_written_as_others(tmp_path: Path) -> None:
    width: Any = np.int64(3)
    pyllava.ImageEmbedding(np.ones((1, 2), np.float32), (width, 4), 1).save(tmp_path / "x.npz")
    assert pyllava.ImageEmbedding.load(tmp_path / "x.npz").size == (3, 4)


def test_names_of_files(tmp_path: Path) -> None:
    made = pyllava.ImageEmbedding(np.zeros((3, 4), np.float32), (5, 5), 1)
    with pytest.raises(ValueError, match=r"need a name that ends in \.safetensors or \.npz"):
        made.save(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError):
        pyllava.ImageEmbedding.load(tmp_path / "a.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(pyllava.ImageError, match="not a regular file"):
        pyllava.ImageEmbedding.load(tmp_path / "pipe.npz")


# --- the cache ---


def test_the_cache_counts_and_keeps_its_limit() -> None:
    row_bytes = 64 * 256 * 4
    pictures = [noise(50 + i, 50) for i in range(4)]
    with pyllava.Llava(n_threads=1, image_cache_bytes=2 * row_bytes) as model:
        for i in (0, 1, 0, 2, 0, 1):  # 1 had to go for 2, and 2 for 1
            model.encode_image(pictures[i])
        stats = model.stats()
        assert (stats.image_cache_hits, stats.image_cache_misses) == (2, 4)
        assert stats.image_cache_bytes == 2 * row_bytes
        assert len(list(model.batch(pictures[3:], QUESTION, max_tokens=1))) == 1
        stats = model.stats()
        assert (stats.image_cache_misses, stats.image_cache_bytes) == (5, 2 * row_bytes)


@pytest.mark.parametrize("n_bytes", [0, 64 * 256 * 4 - 1])
def test_a_cache_without_room_keeps_nothing(n_bytes: int) -> None:
    with pyllava.Llava(n_threads=1, image_cache_bytes=n_bytes) as model:
        first, second = (model.encode_image(SCENE) for _ in range(2))
        assert first is not second
        assert first.key == second.key
        stats = model.stats()
        assert (stats.image_cache_hits, stats.image_cache_misses, stats.image_cache_bytes) == (0, 2, 0)


def test_wrong_limits_of_the_cache() -> None:
    with pytest.raises(ValueError, match="image_cache_bytes: found -1, need 0 or more"):
        pyllava.Llava(image_cache_bytes=-1)
    with pytest.raises(TypeError):
        pyllava.Llava(image_cache_bytes=1e6)  # type: ignore[arg-type]


# --- what a model sees ---

SIZES = [(336, 336), (1200, 150), (200, 900), (97, 61), (1, 700), (3000, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_a_view_shows_the_pixels_and_counts_the_rows(
    demo: pyllava.Llava, tiled: pyllava.Llava, size: tuple[int, int]
) -> None:
    picture = load_image(noise(*size))
    for model, cut in ((demo, pad), (tiled, anyres)):
        seen, spec = model.view(picture), model._pictures.spec
        assert spec is not None
        assert np.array_equal(seen.views, np.stack([np.asarray(view) for view in cut(picture, spec)]))
        assert seen.n_rows == len(model.encode_image(picture))
        assert seen.n_rows == 64 + seen.n_newlines + math.prod(seen.tile_rows or (0,))
        assert seen.image().size >= (600, 600)


def test_where_the_picture_lies(demo: pyllava.Llava, tiled: pyllava.Llava) -> None:
    wide = demo.view(noise(1120, 280))
    assert wide.inside == ((0, 42, 112, 70), None)
    seen = tiled.view(noise(1200, 150))  # 336 x 43 on 3 tiles of 112: 0.28 * 150 is a little above 42
    assert (seen.grid, seen.inside) == ((3, 1), ((0, 0, 112, 112), (0, 34, 336, 77)))
    assert (seen.kept, seen.tile_rows, seen.n_newlines) == ((0, 2, 24, 6), (24, 4), 4)
    assert seen.tiles is not None
    assert not seen.tiles[:34].any()
    assert seen.tiles[34].any()


def test_a_view_with_other_options(tiled: pyllava.Llava) -> None:
    with pyllava.Llava("demo-1.6", n_threads=1, image_merge="flat") as flat:
        seen = flat.view(noise(1200, 150))
        assert (seen.kept, seen.tile_rows, seen.n_newlines, seen.n_rows) == ((0, 0, 24, 8), (24, 8), 0, 256)
    with pyllava.Llava("demo-1.6", n_threads=1, image_max_tiles=0) as whole:
        seen = whole.view(noise(1200, 150))
        assert (seen.tiles, seen.kept, seen.n_newlines, seen.n_rows) == (None, None, 1, 65)
        assert seen.words()[-1] == "a newline: 1 row"


def onevision(path: Path, n_embd: int, **keys: int) -> Path:
    """A projector file that reduces large grids, with a side of 115 pixels, 3 more than its patches cover."""
    pinpoints = tuple((115 * w, 115 * h) for w in range(1, 5) for h in range(1, 5))
    file = tiny_gguf.read(
        anyres_file(path, pinpoints, np.ones(n_embd, np.float32), image_aspect_ratio="anyres_max_4")
    )
    return tiny_gguf.write(path, file.with_u32(clip__vision__image_size=115))


def test_a_grid_that_is_reduced_and_edges_that_no_patch_covers(tmp_path: Path, demo: pyllava.Llava) -> None:
    mmproj = onevision(tmp_path / "mmproj.gguf", demo.n_embd)
    with pyllava.Llava(demo.files.model, mmproj, n_threads=1) as model:
        seen = model.view(noise(500, 400))
        assert seen.n_rows == len(model.encode_image(noise(500, 400)))
        assert (seen.grid, seen.kept) == ((4, 4), (0, 3, 32, 29))
        assert seen.tile_rows == (17, 14)  # sqrt(32 * 26 / (4 * 64)) = 1.803 times fewer
        assert (
            "32 x 26 of 32 x 32 patches kept, reduced to 17 x 14: 238 rows and 14 newlines"
            in seen.words()[-1]
        )
        assert seen.image().size[0] > 1000
        assert model.view(noise(500, 400), n_images=2).tiles is None  # as a prompt with several shows it


def test_rows_of_several_patches(demo: pyllava.Llava) -> None:
    """As MobileVLM's projectors give them: a quarter of the patches."""

    class Joined:
        info = dataclasses.replace(demo.info, n_image_tokens=16, n_embd=8)

        def merge(self, layout: Any, views: np.ndarray) -> np.ndarray:
            assert views.shape == (1, 16, 8)
            return views[0]

    seen = view_of(demo._pictures.picture(noise(90, 30)), Joined())  # type: ignore[arg-type]
    assert (seen.patches, seen.n_side, seen.n_rows) == (8, 4, 16)
    assert seen.words()[1].endswith("8 x 8 patches, 16 rows")
    assert seen.image().width > 600


def test_squashed_pictures() -> None:
    """As SigLIP's processor makes them; the demo model's tower, told to see them so."""
    with pyllava.Llava(n_threads=1) as model:
        spec = model._pictures.spec = dataclasses.replace(
            model._pictures.spec or ImageSpec(112), aspect="squash"
        )
        seen, picture = model.view(noise(90, 30)), load_image(noise(90, 30))
        assert np.array_equal(seen.views[0], np.asarray(squash(picture, spec)[0]))
        assert (seen.inside, seen.n_rows) == (((0, 0, 112, 112), None), 64)
        assert seen.words()[1].startswith("the whole picture, made a square: 112 x 112 pixels")


def test_a_view_is_saved_and_shows_itself(demo: pyllava.Llava, tmp_path: Path) -> None:
    seen = demo.view(SCENE)
    with pytest.raises(ValueError, match=r"'a\.txt': need a name that ends in \.png"):
        seen.save(tmp_path / "a.txt")
    seen.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == seen.image().size
    assert Image.open(io.BytesIO(seen._repr_png_())).format == "PNG"


def test_the_command_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "view.png"
    assert cli.main(["view", str(SCENE), "-m", "demo-1.6", "-o", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "picture of 336 x 336 pixels: 336 rows for the language model"
    assert err.startswith(f"{target}: 14")
    with Image.open(target) as drawn:
        assert drawn.width > 1300
    assert cli.main(["view", str(SCENE), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["n_rows"], facts["view_size"], facts["inside"]) == (64, 112, [[0, 0, 112, 112], None])


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["view", str(SCENE)], 2, "need -o FILE for the drawing, or --json"),
        (["view", "/nowhere/x.png", "--json"], 1, "/nowhere/x.png: No such file"),
        (["view", str(SCENE), "-o", str(SCENE)], 1, "is both input and output"),
        (["view", SCENE.as_uri(), "-o", str(SCENE)], 1, "is both input and output"),
        (["view", str(SCENE), "-o", "/nowhere/x.png"], 1, "no such folder to write into"),
        (["view", str(SCENE), "--json", "--mmproj", "x"], 2, "--mmproj: needs -m"),
    ],
)
def test_the_command_view_fails(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1]
    assert not out


# --- tokens in colours ---


def token(text: str | bytes, p: float, *others: TokenLogprob) -> TokenLogprob:
    data = text.encode() if isinstance(text, str) else text
    return TokenLogprob(data.decode(errors="replace"), 0, data, math.log(p), others)


def answer(*tokens: TokenLogprob, text: str | None = None) -> Answer:
    whole = b"".join(each.bytes for each in tokens).decode(errors="replace").strip() if text is None else text
    return Answer(whole, Usage(0, 1, 0, 1), Timings(0, 0, 0, 0), "stop", logprobs=tokens)


HOSTILE_TEXTS = [
    "\x1b[2J\x1b]0;x\x07",
    "<script>alert(1)</script>",
    '"><img src=x onerror=a>',
    "\u202eevil",
    "\r\x00\x9b",
]


class Tags(html.parser.HTMLParser):
    """The tags and the text of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_hostile_tokens_are_text(text: str) -> None:
    tokens = (token(text, 0.4, token(text, 0.4), token("a", 0.1)), token("b\n", 0.9))
    for source in (
        answer(*tokens).html(),
        answer(text=text).html(),
        answer(token("b", 1.0), text=text + "b").html(),
    ):
        found = Tags(source)
        assert {tag for tag, _ in found.tags} <= {"div", "span"}
        assert all(set(attributes) <= {"style", "title"} for _, attributes in found.tags)
        assert all(c.isprintable() or c == "\n" for c in found.text + str(found.tags))
        assert "b" in found.text or len(found.tags) == 1
    for colored in (False, True):
        shown = "\n".join(_token_colors.terminal_lines(tokens, colored=colored))
        bare = re.sub(r"\x1b\[(30;48;5;\d+|0)m", "", shown)
        assert all(c.isprintable() or c == "\n" for c in bare)
        assert ("\x1b" in shown) == colored


def test_how_other_scripts_are_written_is_kept() -> None:
    written = "می\u200cخواهم 👩\u200d🚀 全\u3000角\u00a0e\u0301"
    assert Tags(answer(text=written + "\tx\ny").html()).text == written + "\tx\ny"
    assert _token_colors.visible("a\u00adb\ufeff\t") == "a\\xadb\\ufeff\\t"


def test_parts_of_characters_are_shown_as_bytes() -> None:
    euro = "€".encode()
    shown = [_token_colors.text_of(token(part, 0.5)) for part in (euro[:1], euro[1:], b"a\xff", euro)]
    assert shown == ["\\xe2", "\\x82\\xac", "a\\xff", "€"]


def test_html_tells_probabilities_and_alternatives(demo: pyllava.Llava) -> None:
    said = demo.ask(SCENE, QUESTION, logprobs=2)
    found = Tags(said._repr_html_())
    titles = [attributes["title"] for tag, attributes in found.tags if "title" in attributes]
    assert len(titles) == len(said.tokens)
    assert titles[0] is not None
    assert titles[0].split("\n")[0] == f"{said.logprobs[0].token}  {_token_colors.percent(said.logprobs[0])}"
    assert len(titles[0].split("\n")) == 3
    assert said.text in found.text
    plain = demo.ask(SCENE, QUESTION)
    assert Tags(plain.html()).text == plain.text


def test_the_beginning_that_was_given_is_shown_without_a_colour(demo: pyllava.Llava) -> None:
    said = demo.ask(SCENE, "What is in the picture?", logprobs=0, start_with="There is a small", max_tokens=6)
    assert said.text.startswith("There is a small")
    assert _token_colors.begun_with(said).strip() == "There is a small"
    assert Tags(said.html()).text.startswith(said.text)
    whole = demo.ask(SCENE, "What is in the picture?", logprobs=0)
    assert _token_colors.begun_with(whole) == ""


def test_colours_follow_the_probability() -> None:
    probabilities = (1.0, 0.9, 0.7, 0.5, 0.3, 0.299, 1e-9)
    colors = re.findall(
        r"48;5;(\d+)ma",
        "".join(_token_colors.terminal_lines([token("a", p) for p in probabilities], colored=True)),
    )
    assert colors == ["153", "153", "195", "230", "222", "215", "215"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _token_colors.takes_color(Terminal())
    assert not _token_colors.takes_color(io.StringIO())
    assert not _token_colors.takes_color(None)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not _token_colors.takes_color(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not _token_colors.takes_color(Terminal())


@pytest.mark.parametrize("quiet", [[], ["--log-disable"]])
def test_the_command_line_shows_tokens_on_stderr(
    quiet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--image", str(SCENE), "-p", QUESTION]
    assert cli.main(argv) == 0
    plain = capsys.readouterr().out
    assert cli.main([*argv, "--logprobs", "1", "--no-perf", *quiet]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    rows = re.findall(r"^ +\d+  '(.+?)' +([\d.]+) %  '(.+?)' ([\d.]+) %$", err, re.MULTILINE)
    assert "".join(row[0] for row in rows).strip() == plain.strip()
    assert all(row[:2] == row[2:] for row in rows)  # greedy: the likeliest is the one that was taken


def test_logprobs_of_the_command_line_are_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--image", str(SCENE), "--logprobs", "-1"]) == 2
    assert "--logprobs: '-1', need an integer of at least 0" in capsys.readouterr().err


# --- notebooks ---

CELLS = [
    "import pyllava\nm = pyllava.Llava(n_threads=1)",
    f"m.ask({str(SCENE)!r}, {QUESTION!r}, logprobs=1)",
    f"m.view({str(SCENE)!r})",
]


def test_a_notebook_shows_answers_and_views() -> None:
    """Executed by a real kernel."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said, seen = (cell.outputs[-1].data for cell in notebook.cells[1:])
    assert "Yellow" in Tags(said["text/html"]).text
    assert seen["image/png"]


def test_ipython_shows_answers_and_views(demo: pyllava.Llava) -> None:
    """What a notebook asks of an object; without IPython its methods are asked for by the same names."""
    said, seen = demo.ask(SCENE, QUESTION), demo.view(SCENE)
    shown = {"text/html": said._repr_html_(), "image/png": seen._repr_png_()}
    formatters = pytest.importorskip("IPython.core.formatters")
    formatter = formatters.DisplayFormatter()
    for found, kind in ((said, "text/html"), (seen, "image/png")):
        assert formatter.format(found)[0][kind] == shown[kind]


# --- the page ---


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "inside.md").read_text(), re.MULTILINE | re.DOTALL
    )


def test_what_the_page_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("sh")).splitlines():
        program, *argv = shlex.split(line, comments=True)
        assert program == "pyllava-cli"
        assert cli.main(argv) == 0
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec("".join(blocks("python")), names)
    names["m"].close()
    assert capsys.readouterr().out == "304 (2, 2) (1, 0, 15, 16)\nYellow\n"
    assert names["seen"].views.shape == (5, 112, 112, 3)
    assert names["star"].array.shape == (336, 256)
    assert "Yellow" in Tags(names["page"]).text
    assert {path.name for path in tmp_path.iterdir()} == {"examples", "view.png", "scene.safetensors"}
