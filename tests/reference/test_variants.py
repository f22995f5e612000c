"""The wider LLaVA family, at small size: checkpoint of `transformers` -> converter -> picture and question -> logits."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_devices import DEVICES, on_a_device
from tiny_gguf import Files, Gguf, gguf

import pyllava
from pyllava import _lib, images, views

from . import gates
from .cases import picture
from .reference import torch
from .variants import VARIANTS, Model, Variant, anyres_max, onevision, squashing, write

pytestmark = pytest.mark.reference

QUESTION = "What is in the picture?"
SIZES = {"wide": (190, 62), "tall": (45, 131), "small": (30, 21), "large": (250, 231), "square": (59, 59)}
N_GREEDY = 24


@dataclass(eq=False)
class Lab:
    """A model, what was made of it, and the judge."""

    variant: Variant
    folder: Path
    opened: dict[Files, pyllava.Llava] = field(default_factory=dict)

    @functools.cached_property
    def checkpoint(self) -> Path:
        return write(self.folder / "checkpoint", self.variant)

    @functools.cached_property
    def judge(self) -> Model:
        return Model(self.checkpoint, self.variant)

    @functools.cached_property
    def files(self) -> Files:
        return converted(self.checkpoint, self.folder / "converted")

    @functools.cached_property
    def llava(self) -> pyllava.Llava:
        return pyllava.Llava(self.files.model, self.files.mmproj, n_threads=1, n_ctx=4096)


def converted(checkpoint: Path, out: Path) -> Files:
    tiny_gguf.run_main("convert_llava", checkpoint, "-o", out, "--outtype", "f16", "--template", "vicuna_v1")
    (mmproj,) = out.glob("*mmproj*.gguf")
    (model,) = set(out.glob("*.gguf")) - {mmproj}
    return Files(model, mmproj)


@pytest.fixture(scope="module", params=list(VARIANTS))
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(VARIANTS[request.param], tmp_path_factory.mktemp("variant"))
    yield lab
    if "llava" in vars(lab):
        lab.llava.close()


@pytest.mark.parametrize("size", list(SIZES))
def test_numbers(lab: Lab, size: str) -> None:
    """The image's rows, and the logits of every position."""
    source = picture(7, *SIZES[size])
    expected = lab.judge.embeddings(source)
    gates.check("embeddings", gates.EMBEDDINGS, expected, lab.llava.encode_image(source).array)
    prompt = lab.llava.prompt_tokens(source, QUESTION)
    logits = lab.judge.logits(prompt, [source], [len(expected)])
    gates.check("logits", gates.LOGITS, logits, lab.llava.logits(source, QUESTION))


def test_greedy(lab: Lab) -> None:
    source = picture(8, *SIZES["wide"])
    prompt = lab.llava.prompt_tokens(source, QUESTION)
    n_image = len(lab.llava.encode_image(source))
    ids = lab.judge.greedy(prompt, source, n_image, N_GREEDY)
    answer = lab.llava.ask(source, QUESTION, max_tokens=N_GREEDY)
    assert list(answer.tokens) == ids[: [*ids, 2].index(2)]
    assert answer.usage.image_tokens == n_image


def test_two_pictures(lab: Lab) -> None:
    """In one prompt; LLaVA-OneVision sees each padded and without tiles then, though alone in tiles."""
    sources = [picture(7, *SIZES["wide"]), picture(8, *SIZES["large"])]
    prompt = lab.llava.prompt_tokens(sources, QUESTION)
    alone = [len(lab.llava.encode_image(source)) for source in sources]
    counts = [17, 17] if lab.llava.info.anyres_max else alone
    expected = lab.judge.logits(prompt, sources, counts)
    gates.check("logits", gates.LOGITS, expected, lab.llava.logits(sources, QUESTION))
    assert list(map(len, map(lab.llava.encode_image, sources))) == alone


@on_a_device
def test_on_a_device(lab: Lab) -> None:
    """All of it there, in the mode that is the default, with the gates of 16-bit computation."""
    source, files = picture(7, *SIZES["wide"]), lab.files
    expected = lab.judge.embeddings(source)
    with pyllava.Llava(files.model, files.mmproj, device=DEVICES[0], precision="fast") as llava:
        assert (llava.devices.n_gpu_layers, llava.devices.vision) == (3, DEVICES[0])
        gates.check("embeddings", gates.EMBEDDINGS_F16, expected, llava.encode_image(source).array)
        prompt = llava.prompt_tokens(source, QUESTION)
        logits = lab.judge.logits(prompt, [source], [len(expected)])
        gates.check("logits", gates.LOGITS_F16, logits, llava.logits(source, QUESTION))


# Names of tensors through the ages


def one_level_more(name: str) -> str:
    return re.sub(r"^(model\.)?vision_tower\.", r"\g<0>vision_model.", name)


def in_the_model(name: str) -> str:
    """As transformers calls them in memory."""
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
    return name if name.startswith("lm_head") else "model." + name


GENERATIONS: dict[str, Callable[[str], str]] = {
    "published": one_level_more,
    "4.52": lambda name: one_level_more(in_the_model(name)),
    "in memory": in_the_model,
}


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_names_of_every_generation(lab: Lab, generation: str, tmp_path: Path) -> None:
    """The same files, to the byte."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "checkpoint"
    shutil.copytree(lab.checkpoint, source)
    tensors = load_file(source / "model.safetensors")
    new = {GENERATIONS[generation](name): x for name, x in tensors.items()}
    assert set(new) != set(tensors)
    save_file(new, source / "model.safetensors", metadata={"format": "pt"})
    files = converted(source, tmp_path / "converted")
    assert files.model.read_bytes() == lab.files.model.read_bytes()
    assert files.mmproj.read_bytes() == lab.files.mmproj.read_bytes()


# SigLIP's towers


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(VARIANTS["joycaption"], tmp_path_factory.mktemp("siglip"))
    yield lab
    lab.llava.close()


def dropped(file: Gguf, n_layer: int) -> Gguf:
    """As a converter leaves it that drops the layers which are not read."""
    file = file.renamed(lambda name: None if f"v.blk.{n_layer}." in name else name)
    return file.with_u32(clip__vision__block_count=n_layer)


def by_llama_cpp(file: Gguf) -> Gguf:
    """Its converter knows only the erf form, so it says no GELU; neither layers nor aspect ratio are told."""
    kinds = gguf.GGUFValueType
    file = file.without_keys("clip.vision.feature_layer", "clip.vision.image_aspect_ratio", "general.type")
    return replace(file, keys=file.keys | {"clip.use_gelu": (False, kinds.BOOL, None)})


def with_leftovers(file: Gguf) -> Gguf:
    """Parts of the tower that LLaVA never uses."""
    ones = tiny_gguf.f32(np.full(64, 3.0))
    names = ("v.post_ln.weight", "v.post_ln.bias", "v.head.probe", "v.head.ln.weight")
    return file.with_tensors(dict.fromkeys(names, ones))


FILES: dict[str, Callable[[Gguf], Gguf]] = {
    "27 layers": by_llama_cpp,
    "26 layers": lambda file: by_llama_cpp(dropped(file, 26)),
    "leftovers": lambda file: with_leftovers(by_llama_cpp(file)),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_siglip_files_of_other_tools(siglip: Lab, kind: str, tmp_path: Path) -> None:
    """The tower's shape tells what the keys do not: tanh-GELU, the layer, that pictures are squashed."""
    source = picture(7, *SIZES["wide"])
    file = FILES[kind](tiny_gguf.read(siglip.files.mmproj))
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", file)
    with pyllava.Llava(siglip.files.model, mmproj, n_threads=1) as llava:
        assert (llava.info.n_layer_vision_run, llava.info.aspect) == (26, "squash")
        expected = siglip.judge.embeddings(source)
        gates.check("embeddings", gates.EMBEDDINGS, expected, llava.encode_image(source).array)


def test_mean_of_clip_is_told(siglip: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is what llama.cpp's converter writes unless it is told otherwise."""
    kinds = gguf.GGUFValueType
    file = tiny_gguf.read(siglip.files.mmproj)
    mean = ([0.48145466, 0.4578275, 0.40821073], kinds.ARRAY, kinds.FLOAT32)
    wrong = replace(file, keys=file.keys | {"clip.vision.image_mean": mean})
    for made, told in ((file, False), (wrong, True)):
        caplog.clear()
        mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", made)
        pyllava.Llava(siglip.files.model, mmproj, n_threads=1).close()
        assert ("SigLIP has 0.5" in caplog.text) == told


def test_pad_is_obeyed(siglip: Lab, tmp_path: Path) -> None:
    """Models whose original code pads say so."""
    file = tiny_gguf.read(siglip.files.mmproj)
    keys = {"clip.vision.image_aspect_ratio": ("pad", gguf.GGUFValueType.STRING, None)}
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", replace(file, keys=file.keys | keys))
    source = picture(7, *SIZES["wide"])
    with pyllava.Llava(siglip.files.model, mmproj, n_threads=1) as llava:
        found = llava.encode_image(source).array
    square = np.full((190, 190, 3), 127, np.uint8)
    square[64:126] = source
    gates.check("embeddings", gates.EMBEDDINGS, siglip.judge.embeddings(square), found)


def test_fast_mode(lab: Lab) -> None:
    """With the gate of docs/architecture.md for image embeddings."""
    source = picture(7, *SIZES["wide"])
    with pyllava.Llava(lab.files.model, lab.files.mmproj, n_threads=1, precision="fast") as llava:
        cosines = gates.row_cosines(lab.judge.embeddings(source), llava.encode_image(source).array)
    assert cosines.mean() > 0.9998
    assert cosines.min() > 0.9995


# LLaVA-OneVision at the real side of a view

ONEVISION = replace(
    VARIANTS["onevision"],
    config=functools.partial(onevision, 384, 2),
    processor=functools.partial(anyres_max, 384),
)
# Tokens of a picture (width, height); those from 1000 x 1000 on are reduced, but for the slender one.
COUNTS = {
    (384, 384): 1485,
    (100, 100): 1485,
    (640, 480): 2929,
    (480, 640): 2943,
    (800, 600): 4725,
    (1000, 1000): 7371,
    (1920, 1080): 7269,
    (1080, 1920): 7317,
    (2000, 200): 3500,
    (2304, 2304): 7371,
    (4000, 3000): 7309,
    (3840, 2160): 7317,
    (1123, 1345): 8765,
}


@pytest.fixture(scope="module")
def real_side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(ONEVISION, tmp_path_factory.mktemp("real"))
    yield lab
    lab.llava.close()


@pytest.mark.parametrize("size", list(COUNTS))
def test_counts(real_side: Lab, size: tuple[int, int]) -> None:
    llava = real_side.llava
    picture = llava._pictures.look_at(np.zeros((size[1], size[0], 3), np.uint8))
    assert len(picture) == COUNTS[size]


@pytest.mark.parametrize("size", [(640, 480), (2304, 2304)])
def test_real_side(real_side: Lab, size: tuple[int, int]) -> None:
    """5 views, and 37, which are encoded in several batches."""
    source = picture(3, *size)
    found = real_side.llava.encode_image(source)
    assert len(found) == COUNTS[size]
    gates.check("embeddings", gates.EMBEDDINGS, real_side.judge.embeddings(source), found.array)


def test_memory_does_not_grow_with_the_views(real_side: Lab) -> None:
    model = real_side.llava._model
    sizes = []
    for n_views in (1, 5, 6, 37):
        session = _lib.SessionHandle(model, n_ctx=64, n_views=n_views, precision="exact")
        sizes.append(session.memory()[2])
        session.close()
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def original_name(name: str) -> str:
    for start, new in (
        ("language_model.", ""),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    ):
        if name.startswith(start):
            return new + name[len(start) :]
    raise AssertionError(name)


def write_lmms_lab(folder: Path, checkpoint: Path) -> Path:
    """The same model in the layout of lmms-lab: a tower without the last layer that its config counts, resolutions as a
    text, settings that the code for SigLIP does not read.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {original_name(name): x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(checkpoint / name, folder)
    table = json.loads((checkpoint / "config.json").read_text())
    own = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    (folder / "config.json").write_text(json.dumps(table["text_config"] | own))
    tower = folder.parent / "siglip-so400m-patch14-384"
    tower.mkdir()
    vision = table["vision_config"] | {"num_hidden_layers": table["vision_config"]["num_hidden_layers"] + 1}
    (tower / "config.json").write_text(json.dumps(vision))
    return folder


def test_layout_of_lmms_lab(real_side: Lab, tmp_path: Path) -> None:
    """Becomes the same tower, projector and language model as that of transformers."""
    files = converted(write_lmms_lab(tmp_path / "m" / "checkpoint", real_side.checkpoint), tmp_path / "out")
    assert files.mmproj.read_bytes() == real_side.files.mmproj.read_bytes()
    assert files.model.read_bytes() == real_side.files.model.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(VARIANTS["onevision"], tmp_path_factory.mktemp("small"))
    yield lab
    lab.llava.close()


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)))
@example((700, 1))
@example((1, 700))
@example((354, 354))
def test_reduced_grids(small: Lab, size: tuple[int, int]) -> None:
    """Rows of numbers that are no features, merged by transformers' own procedure: nine views' worth of 16 rows each."""
    llava = small.llava
    grid = views.tile_grid(size, llava._pictures.spec)
    shape = (1 + grid[0] * grid[1], 16, 64)
    rows = np.random.RandomState(size[0]).standard_normal(shape).astype(np.float32)
    (expected,), _ = small.judge.net.model.pack_image_features(
        [torch.from_numpy(rows)], torch.tensor([size[::-1]]), small.judge.net.model.image_newline
    )
    found = llava._model.merge(_lib.Layout(grid, size, flat=False), rows)
    gates.check("rows", gates.EMBEDDINGS, expected.detach().numpy(), found)


# SigLIP's processor


@pytest.mark.parametrize("size", [*SIZES.values(), (1, 9), (1500, 1100)])
def test_squashed_pixels(size: tuple[int, int]) -> None:
    """The 8-bit pixels are those of transformers' processor to the bit, the normalised ones to rounding."""
    source, spec = picture(9, *size), views.ImageSpec(59, (0.5,) * 3, (0.5,) * 3, "squash")
    image = images.load_image(source)
    (view,) = views.squash(image, spec)
    bare: Any = squashing()(source, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(np.asarray(view).transpose(2, 0, 1), bare["pixel_values"][0])
    full = squashing()(source, return_tensors="np")["pixel_values"]
    gates.check("pixels", gates.PIXELS, full, views.preprocess(image, spec).pixels)
