"""Projectors besides LLaVA-1.5's: checkpoint -> converter -> embeddings, judged by PyTorch's operations.

`transformers` has no class for these models. The networks are written down here as their papers and original code have
them: the first LLaVA's one layer, Yi-VL's normalised layers, MobileVLM's and MobileVLM V2's convolutions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_gguf
from tiny import Array, TinySpec
from tiny_gguf import Files

import pyllava

from . import gates
from .cases import picture
from .reference import Reference, pixels_of, torch, transformers

pytestmark = pytest.mark.reference
F = torch.nn.functional

SPEC = TinySpec(image_size=70, n_embd=64, v_layer=4, seed=30)  # squares of 5 patches: an odd side to halve
SQUEEZED = 24
Weights = dict[str, Any]


class Draw:
    """Random weights that keep activations near 1."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(9)
        self.found: dict[str, Array] = {}

    def matrix(self, name: str, n_out: int, n_in: int, *kernel: int, bias: bool = True) -> None:
        n = n_in * int(np.prod(kernel or 1))
        values = self.random.standard_normal((n_out, n_in, *kernel)) / n**0.5
        self.found[f"{name}.weight"] = values.astype(np.float32)
        if bias:
            self.vector(f"{name}.bias", n_out)

    def vector(self, name: str, n: int, mean: float = 0.0) -> None:
        self.found[name] = (mean + 0.1 * self.random.standard_normal(n)).astype(np.float32)

    def norm(self, name: str) -> None:
        self.vector(f"{name}.weight", SPEC.n_embd, mean=1.0)
        self.vector(f"{name}.bias", SPEC.n_embd)


def linear(w: Weights, name: str, x: Any) -> Any:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Any, eps: float) -> Any:
    return F.layer_norm(x, (SPEC.n_embd,), w[f"{name}.weight"], w[f"{name}.bias"], eps)


def channels_first(x: Any) -> Any:
    """[views, n, E] to [views, E, side, side]."""
    side = round(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))


def rows(x: Any) -> Any:
    return x.flatten(2).transpose(1, 2)


# The projectors: their weights, and what they compute from features [views, n, D]


def linear_weights(draw: Draw) -> None:
    draw.matrix("_", SPEC.n_embd, SPEC.v_embd)


def linear_projector(w: Weights, x: Any) -> Any:
    return linear(w, "_", x)


def mlp_norm_weights(draw: Draw) -> None:
    draw.matrix("0", SPEC.n_embd, SPEC.v_embd)
    draw.norm("1")
    draw.matrix("3", SPEC.n_embd, SPEC.n_embd)
    draw.norm("4")


def mlp_norm(w: Weights, x: Any) -> Any:
    x = norm(w, "1", linear(w, "0", x), 1e-5)
    return norm(w, "4", linear(w, "3", F.gelu(x)), 1e-5)


def ldp_weights(draw: Draw) -> None:
    draw.matrix("model.mlp.1", SPEC.n_embd, SPEC.v_embd)
    draw.matrix("model.mlp.3", SPEC.n_embd, SPEC.n_embd)
    for i in (1, 2):
        name = f"model.mb_block.{i}.block"
        draw.matrix(f"{name}.0.0", SPEC.n_embd, 1, 3, 3, bias=False)
        draw.norm(f"{name}.0.1")
        draw.matrix(f"{name}.1.fc1", SQUEEZED, SPEC.n_embd, 1, 1)
        draw.matrix(f"{name}.1.fc2", SPEC.n_embd, SQUEEZED, 1, 1)
        draw.matrix(f"{name}.2.0", SPEC.n_embd, SPEC.n_embd, 1, 1, bias=False)
        draw.norm(f"{name}.2.1")


def mobile_block(w: Weights, name: str, x: Any, stride: int) -> Any:
    def channel_norm(part: str, x: Any) -> Any:
        return norm(w, f"{name}.{part}", x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)

    x = F.conv2d(x, w[f"{name}.0.0.weight"], stride=stride, padding=1, groups=SPEC.n_embd)
    x = F.hardswish(channel_norm("0.1", x))
    s = F.adaptive_avg_pool2d(x, 1)
    s = F.relu(F.conv2d(s, w[f"{name}.1.fc1.weight"], w[f"{name}.1.fc1.bias"]))
    s = F.hardsigmoid(F.conv2d(s, w[f"{name}.1.fc2.weight"], w[f"{name}.1.fc2.bias"]))
    return channel_norm("2.1", F.conv2d(x * s, w[f"{name}.2.0.weight"]))


def ldp(w: Weights, x: Any) -> Any:
    x = channels_first(linear(w, "model.mlp.3", F.gelu(linear(w, "model.mlp.1", x))))
    x = x + mobile_block(w, "model.mb_block.1.block", x, 1)
    return rows(mobile_block(w, "model.mb_block.2.block", x, 2))


def ldpv2_weights(draw: Draw) -> None:
    draw.matrix("mlp.mlp.0", SPEC.n_embd, SPEC.v_embd)
    draw.matrix("mlp.mlp.2", SPEC.n_embd, SPEC.n_embd)
    draw.matrix("peg.peg.0", SPEC.n_embd, 1, 3, 3)


def ldpv2(w: Weights, x: Any) -> Any:
    x = channels_first(linear(w, "mlp.mlp.2", F.gelu(linear(w, "mlp.mlp.0", x))))
    x = F.avg_pool2d(x, 2)
    return rows(x + F.conv2d(x, w["peg.peg.0.weight"], w["peg.peg.0.bias"], padding=1, groups=SPEC.n_embd))


@dataclass(frozen=True)
class Projector:
    weights: Callable[[Draw], None]
    network: Callable[[Weights, Any], Any]
    n_rows: int


PROJECTORS = {
    "linear": Projector(linear_weights, linear_projector, 25),
    "mlp_norm": Projector(mlp_norm_weights, mlp_norm, 25),
    "ldp": Projector(ldp_weights, ldp, 9),
    "ldpv2": Projector(ldpv2_weights, ldpv2, 4),
}


@dataclass(frozen=True)
class Lab:
    kind: str
    files: Files
    judge: Reference
    weights: dict[str, Array]

    def embeddings(self, pixels: Array) -> Array:
        """float32 [views * n, n_embd]"""
        x = self.judge.encode(pixels)["v.features"].reshape(len(pixels), -1, SPEC.v_embd)
        w = {name: torch.from_numpy(array) for name, array in self.weights.items()}
        found = PROJECTORS[self.kind].network(w, torch.from_numpy(x))
        return np.ascontiguousarray(found.detach().numpy().reshape(-1, SPEC.n_embd))


def drawn(kind: str) -> dict[str, Array]:
    draw = Draw()
    PROJECTORS[kind].weights(draw)
    return draw.found


def projector_of(kind: str) -> dict[str, Array]:
    """By its names in a checkpoint."""
    return {f"model.mm_projector.{name}".replace("._.", "."): x for name, x in drawn(kind).items()}


def made(folder: Path, kind: str, outtype: str = "f32") -> Files:
    llava = tiny.write_llava_checkpoint(folder / "llava", SPEC, projector=False)
    tiny.write_safetensors(llava / "mm_projector.safetensors", projector_of(kind), "f32")
    clip = tiny.write_clip_folder(folder / "clip", SPEC)
    tiny_gguf.run_main("llava_surgery", "-m", llava)
    flags = ["--use-f32"] if outtype == "f32" else []
    tiny_gguf.run_main(
        "convert_image_encoder_to_gguf", "-m", clip, "--llava-projector", llava / "llava.projector",
        "-o", folder / "out", *flags,
    )  # fmt: skip
    model = folder / "model.gguf"
    tiny_gguf.run_main(
        "convert_legacy_llama", llava, "--skip-unknown", "--outtype", "f32", "--outfile", model
    )
    (mmproj,) = (folder / "out").glob("*.gguf")
    return Files(model, mmproj)


@pytest.fixture(scope="module", params=list(PROJECTORS))
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    kind = request.param
    from .reference import Weights as Checkpoint

    judge = Reference(SPEC, Checkpoint.of(SPEC).with_f16_patches())
    return Lab(kind, made(tmp_path_factory.mktemp(kind), kind), judge, drawn(kind))


@pytest.mark.parametrize("size", [(190, 62), (45, 131), (30, 21)])
def test_numbers(lab: Lab, size: tuple[int, int]) -> None:
    source = picture(3, *size)
    with pyllava.Llava(lab.files.model, lab.files.mmproj, n_threads=1) as llava:
        found = llava.encode_image(source).array
    assert len(found) == PROJECTORS[lab.kind].n_rows
    expected = lab.embeddings(pixels_of(source, SPEC.image_size)[None])
    gates.check(lab.kind, gates.EMBEDDINGS, expected, found)


def test_what_is_seen_has_the_rows_of_the_projector(lab: Lab) -> None:
    with pyllava.Llava(lab.files.model, lab.files.mmproj, n_threads=1) as llava:
        seen = llava.view(picture(3, 190, 62))
    assert (seen.patches, seen.n_rows) == (5, PROJECTORS[lab.kind].n_rows)


def test_fast_mode(lab: Lab) -> None:
    """With the gate of docs/architecture.md for image embeddings."""
    source = picture(3, 190, 62)
    with pyllava.Llava(lab.files.model, lab.files.mmproj, n_threads=2, precision="fast") as llava:
        found = llava.encode_image(source).array
    cosines = gates.row_cosines(lab.embeddings(pixels_of(source, SPEC.image_size)[None]), found)
    assert cosines.mean() > 0.9998
    assert cosines.min() > 0.9995


def test_views_of_a_batch(lab: Lab) -> None:
    """Each is computed by itself: no mean, no convolution goes over its edge."""
    from pyllava import _lib

    pixels = np.random.RandomState(1).randn(3, 3, SPEC.image_size, SPEC.image_size).astype(np.float32)
    model = _lib.ModelHandle(lab.files.model, lab.files.mmproj)
    session = _lib.SessionHandle(model, n_ctx=64, n_views=3, n_threads=2, precision="exact")
    found = session.encode(pixels)
    gates.check(lab.kind, gates.EMBEDDINGS, lab.embeddings(pixels), found.reshape(-1, SPEC.n_embd))
    session.close()
    model.close()


def test_files_that_say_mlp(lab: Lab, tmp_path: Path) -> None:
    """Of two kinds, as llama.cpp's converter writes them: the tensors tell."""
    if lab.kind not in ("linear", "mlp_norm"):
        pytest.skip("their files name their kind")
    file = tiny_gguf.read(lab.files.mmproj)
    kinds = tiny_gguf.gguf.GGUFValueType
    keys = file.keys | {"clip.projector_type": ("mlp", kinds.STRING, None)}
    mmproj = tiny_gguf.write(tmp_path / "mmproj.gguf", tiny_gguf.Gguf(keys, file.tensors))
    source = picture(3, 45, 131)
    with pyllava.Llava(lab.files.model, mmproj, n_threads=1) as llava:
        found = llava.encode_image(source).array
    gates.check(lab.kind, gates.EMBEDDINGS, lab.embeddings(pixels_of(source, SPEC.image_size)[None]), found)


# As they are published: the projector among the language model's tensors, the tower outside


@dataclass(frozen=True)
class Published:
    """`config` as far as it differs from LLaVA-1.5's; `tower`: its folder, from that of the model."""

    kind: str
    config: dict[str, str]
    tower: str
    template: str
    activation: str = "quick_gelu"


MOBILE = {
    "model_type": "mobilevlm",
    "architectures": ["MobileLlamaForCausalLM"],
    "mm_vision_tower": "mtgv/clip-l",
}
PUBLISHED = {
    "LLaVA-7B-v1": Published(
        "linear",
        {"mm_projector_type": "linear", "mm_vision_tower": "openai/clip-l"},
        "../clip-l",
        "vicuna_v1",
    ),
    "Yi-VL-6B": Published(
        "mlp_norm",
        {"mm_projector_type": "mlp2x_gelu_Norm", "mm_vision_tower": "./vit/clip-h-yi-vl-6B-448"},
        "vit/clip-h-yi-vl-6B-448",
        "yi_vl",
        activation="gelu",
    ),
    "MobileVLM-1.7B": Published("ldp", {**MOBILE, "mm_projector_type": "ldpnet"}, "../clip-l", "vicuna_v1"),
    "MobileVLM_V2-1.7B": Published(
        "ldpv2", {**MOBILE, "mm_projector_type": "ldpnetv2"}, "../clip-l", "vicuna_v1"
    ),
}


def write_published(folder: Path, model: Published) -> Path:
    tiny.write_llava_checkpoint(folder, SPEC, projector=False)
    tiny.write_shards(
        folder, tiny.language_tensors(SPEC) | projector_of(model.kind), "f32", fmt="bin", shards=2
    )
    (folder / "model.safetensors").unlink()
    config = tiny.llava_config(SPEC) | model.config
    (folder / "config.json").write_text(json.dumps(config))
    tower = tiny.write_clip_folder(folder / model.tower, SPEC, layout="vision")
    vision = tiny.vision_config(SPEC) | {"hidden_act": model.activation}
    (tower / "config.json").write_text(json.dumps(vision))
    return folder


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_in_one_command(name: str, tmp_path: Path) -> None:
    """From the folder as it is published, its tower where the config says; the model says which template it has."""
    from .reference import Weights as Checkpoint

    model = PUBLISHED[name]
    folder, out = write_published(tmp_path / name, model), tmp_path / "out"
    types = ("--outtype", "f32", "--mmproj-outtype", "f32")
    tiny_gguf.run_main("convert_llava", folder, "-o", out, *types)
    files = Files(out / f"{name}-f32.gguf", out / f"mmproj-{name}-f32.gguf")
    judge = Reference(SPEC, Checkpoint.of(SPEC).with_f16_patches())
    for layer in getattr(judge.tower, "vision_model", judge.tower).encoder.layers:
        layer.mlp.activation_fn = transformers.activations.ACT2FN[model.activation]
    lab = Lab(model.kind, files, judge, drawn(model.kind))
    source = picture(3, 45, 131)
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as llava:
        assert llava.template.name == model.template
        found = llava.encode_image(source).array
    expected = lab.embeddings(pixels_of(source, SPEC.image_size)[None])
    gates.check(model.kind, gates.EMBEDDINGS, expected, found)
