"""convert_image_encoder_to_gguf: keys, names, types and numbers of the projector file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import failure, read_gguf
from tiny import (
    TinySpec,
    projector_tensors,
    vision_tensors,
    write_clip_folder,
    write_llava_checkpoint,
    write_safetensors,
    write_tensors,
)

from pyllava.convert.errors import CheckpointError
from pyllava.convert.projector_file import convert
from pyllava.convert.surgery import split_off

SPEC = TinySpec()


def prepared(folder: Path, spec: TinySpec = SPEC, **clip: Any) -> tuple[Path, Path]:
    """A LLaVA folder with llava.projector, and a CLIP folder."""
    write_llava_checkpoint(folder / "llava", spec)
    split_off(folder / "llava", folder / "llava")
    return write_clip_folder(folder / "clip", spec, **clip), folder / "llava" / "llava.projector"


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text())
    for key, value in changes.items():
        table.pop(key, None)
        if value is not ...:
            table[key] = value
    path.write_text(json.dumps(table))


def expected(spec: TinySpec) -> dict[str, np.ndarray]:
    """The file's tensors by name, written out by hand rather than through the converter's tables."""
    v, p = vision_tensors(spec), projector_tensors(spec)
    out = {
        "mm.0.weight": p["model.mm_projector.0.weight"],
        "mm.0.bias": p["model.mm_projector.0.bias"],
        "mm.2.weight": p["model.mm_projector.2.weight"],
        "mm.2.bias": p["model.mm_projector.2.bias"],
        "v.class_embd": v["vision_model.embeddings.class_embedding"],
        "v.patch_embd.weight": v["vision_model.embeddings.patch_embedding.weight"],
        "v.position_embd.weight": v["vision_model.embeddings.position_embedding.weight"],
        "v.pre_ln.weight": v["vision_model.pre_layrnorm.weight"],
        "v.pre_ln.bias": v["vision_model.pre_layrnorm.bias"],
    }
    for i in range(spec.v_layer):
        for end in ("weight", "bias"):
            hf, name = f"vision_model.encoder.layers.{i}.", f"v.blk.{i}."
            for part in "qkv":
                out[f"{name}attn_{part}.{end}"] = v[f"{hf}self_attn.{part}_proj.{end}"]
            out[f"{name}attn_out.{end}"] = v[f"{hf}self_attn.out_proj.{end}"]
            out[f"{name}ln1.{end}"] = v[f"{hf}layer_norm1.{end}"]
            out[f"{name}ln2.{end}"] = v[f"{hf}layer_norm2.{end}"]
            out[f"{name}ffn_down.{end}"] = v[f"{hf}mlp.fc1.{end}"]
            out[f"{name}ffn_up.{end}"] = v[f"{hf}mlp.fc2.{end}"]
    return out


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", ["clip", "vision"])
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_names_types_and_numbers(tmp_path: Path, fmt: str, layout: str, outtype: str) -> None:
    clip, projector = prepared(tmp_path, fmt=fmt, layout=layout)
    path = convert(clip, projector, tmp_path / "out", outtype=outtype)
    assert path == tmp_path / "out" / f"mmproj-model-{outtype}.gguf"
    file, wanted = read_gguf(path), expected(SPEC)
    assert set(file.tensors) == set(wanted)
    for name, array in wanted.items():
        half = name == "v.patch_embd.weight" or (outtype == "f16" and array.ndim == 2)
        assert file.kinds[name] == ("F16" if half else "F32"), name
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(
            file.tensors[name], array.astype(np.float16 if half else np.float32), name
        )


def test_q8_0_quantises_the_matrices_alone(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    file, wanted = read_gguf(convert(clip, projector, tmp_path / "out", outtype="q8_0")), expected(SPEC)
    for name, array in wanted.items():
        half = name in ("v.patch_embd.weight", "v.position_embd.weight")
        kind = "F16" if half else "Q8_0" if array.ndim == 2 else "F32"
        assert file.kinds[name] == kind, name
        step = np.abs(array).max() / 127 if kind == "Q8_0" else 0.0
        np.testing.assert_allclose(file.tensors[name], array, rtol=1e-3, atol=step + 1e-4)


def test_keys(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    file = read_gguf(convert(clip, projector, tmp_path / "out"))
    mean, std = file.kv.pop("clip.vision.image_mean"), file.kv.pop("clip.vision.image_std")
    np.testing.assert_allclose(mean, [0.48145466, 0.4578275, 0.40821073], rtol=1e-7)
    np.testing.assert_allclose(std, [0.26862954, 0.26130258, 0.27577711], rtol=1e-7)
    assert file.kv.pop("clip.vision.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert file.kv == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 1,
        "general.name": "clip",
        "general.description": "image encoder for LLaVA",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 96,
        "clip.vision.projection_dim": 16,
        "clip.vision.attention.head_count": 2,
        "clip.vision.block_count": 3,
        "clip.vision.feature_layer": [2],
        "clip.vision.image_aspect_ratio": "pad",
        "clip.vision.mm_projector_type": "mlp2x_gelu",
        "clip.use_gelu": False,
    }
    names = {key: [kind.name for kind in kinds] for key, kinds in file.types.items()}
    assert names["clip.vision.feature_layer"] == ["ARRAY", "INT32"]
    assert names["clip.vision.image_mean"] == ["ARRAY", "FLOAT32"]
    assert names["clip.use_gelu"] == ["BOOL"]
    assert names["clip.vision.block_count"] == ["UINT32"]


@pytest.mark.parametrize(("select", "layer"), [(-2, 2), (-1, 3), (-3, 1), (2, 2), ([-2], 2)])
def test_feature_layer(tmp_path: Path, select: Any, layer: int) -> None:
    clip, projector = prepared(tmp_path)
    edit(tmp_path / "llava" / "config.json", mm_vision_select_layer=select)
    file = read_gguf(convert(clip, projector, tmp_path))
    assert file.kv["clip.vision.feature_layer"] == [layer]
    assert file.kv["clip.vision.block_count"] == 3
    assert "v.blk.2.ln1.weight" in file.tensors


@pytest.mark.parametrize("select", [-5, 4, "last", [-2, -5], [], [-1] * 9])
def test_feature_layer_refused(tmp_path: Path, select: Any) -> None:
    clip, projector = prepared(tmp_path)
    edit(tmp_path / "llava" / "config.json", mm_vision_select_layer=select)
    with pytest.raises(CheckpointError, match="vision feature layer"):
        convert(clip, projector, tmp_path)


def test_without_a_llava_config(tmp_path: Path) -> None:
    """A projector on its own: the layer LLaVA uses, no word about the aspect ratio."""
    clip, projector = prepared(tmp_path)
    (tmp_path / "alone").mkdir()
    moved = projector.rename(tmp_path / "alone" / "llava.projector")
    file = read_gguf(convert(clip, moved, tmp_path))
    assert file.kv["clip.vision.feature_layer"] == [2]
    assert "clip.vision.image_aspect_ratio" not in file.kv


def test_class_token_features_are_refused(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    edit(tmp_path / "llava" / "config.json", mm_vision_select_feature="cls_patch")
    with pytest.raises(CheckpointError, match="cls_patch"):
        convert(clip, projector, tmp_path)


def test_llava_16_keys(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    pairs = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    edit(
        tmp_path / "llava" / "config.json", image_grid_pinpoints=pairs, mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres", image_crop_resolution=224, image_split_resolution=224,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"no model\.image_newline"):
        convert(clip, projector, tmp_path)
    newline = np.arange(SPEC.n_embd, dtype=np.float32)
    write_safetensors(projector, {**projector_tensors(SPEC), "model.image_newline": newline}, "f32")
    file = read_gguf(convert(clip, projector, tmp_path))
    assert file.kv["clip.vision.image_grid_pinpoints"] == [n for pair in pairs for n in pair]
    assert [kind.name for kind in file.types["clip.vision.image_grid_pinpoints"]] == ["ARRAY", "INT32"]
    assert file.kv["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert file.kv["clip.vision.image_aspect_ratio"] == "anyres"
    assert (
        file.kv["clip.vision.image_crop_resolution"] == file.kv["clip.vision.image_split_resolution"] == 224
    )
    np.testing.assert_array_equal(file.tensors["model.image_newline"], newline)


def test_torch_projector_of_the_original_scripts(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    first = convert(clip, projector, tmp_path / "a").read_bytes()
    projector.unlink()
    zipped = tmp_path / "x.bin"
    write_tensors(zipped, projector_tensors(SPEC), "f32")
    zipped.rename(projector)
    assert convert(clip, projector, tmp_path / "b").read_bytes() == first


def test_tower_of_the_checkpoint(tmp_path: Path) -> None:
    """BakLLaVA: llava.clip put into a folder beside CLIP's config gives the checkpoint's own tower."""
    clip, _ = prepared(tmp_path)
    own = TinySpec(seed=3)
    write_llava_checkpoint(tmp_path / "bak", own, tower=True)
    split_off(tmp_path / "bak", tmp_path / "bak")
    (clip / "model.safetensors").write_bytes((tmp_path / "bak" / "llava.clip").read_bytes())
    file = read_gguf(convert(clip, tmp_path / "bak" / "llava.projector", tmp_path, outtype="f32"))
    wanted = expected(own)["v.blk.1.attn_q.weight"]
    np.testing.assert_array_equal(file.tensors["v.blk.1.attn_q.weight"], wanted)
    named_bin = clip / "pytorch_model.bin"  # as the seed's notes name it: content decides, not the suffix
    (clip / "model.safetensors").rename(named_bin)
    again = read_gguf(convert(clip, tmp_path / "bak" / "llava.projector", tmp_path, outtype="f32"))
    np.testing.assert_array_equal(again.tensors["v.blk.1.attn_q.weight"], wanted)


def test_tower_without_prefix(tmp_path: Path) -> None:
    """Newer transformers save a CLIPVisionModel without `vision_model.`."""
    clip, projector = prepared(tmp_path, layout="vision")
    first = convert(clip, projector, tmp_path / "a").read_bytes()
    bare = {name.removeprefix("vision_model."): array for name, array in vision_tensors(SPEC).items()}
    write_safetensors(clip / "model.safetensors", bare, "f32")
    assert convert(clip, projector, tmp_path / "b").read_bytes() == first


def test_tower_of_the_siglip_kind(tmp_path: Path) -> None:
    """No class token, no first norm, a bias on the patches, GELU, its own mean; the pooling head is left out."""
    clip, projector = prepared(tmp_path, layout="vision")
    tensors = vision_tensors(SPEC)
    for name in ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias"):
        del tensors["vision_model." + name]
    positions = tensors["vision_model.embeddings.position_embedding.weight"][:-1].copy()
    tensors["vision_model.embeddings.position_embedding.weight"] = positions
    tensors["vision_model.embeddings.patch_embedding.bias"] = np.ones(32, np.float32)
    tensors["vision_model.head.probe"] = np.ones((1, 1, 32), np.float32)
    write_safetensors(clip / "model.safetensors", tensors, "f32")
    edit(clip / "config.json", hidden_act="gelu_pytorch_tanh", model_type="siglip_vision_model")
    edit(clip / "preprocessor_config.json", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    file = read_gguf(convert(clip, projector, tmp_path))
    assert file.kv["clip.use_gelu"] is True
    assert file.kv["clip.vision.image_mean"] == [0.5] * 3
    assert "v.class_embd" not in file.tensors
    assert "v.pre_ln.weight" not in file.tensors
    assert file.tensors["v.patch_embd.bias"].shape == (32,)
    assert file.tensors["v.position_embd.weight"].shape == (16, 32)


def projector_of(kind: str, spec: TinySpec) -> dict[str, np.ndarray]:
    """Projectors of other families, random, under their checkpoints' names."""
    r, d, e = np.random.RandomState(1), spec.v_embd, spec.n_embd

    def x(*shape: int) -> np.ndarray:
        return r.standard_normal(shape).astype(np.float32)

    p = "model.mm_projector."
    if kind == "mlp_norm":
        return {
            **{p + "0.weight": x(e, d), p + "0.bias": x(e), p + "1.weight": x(e), p + "1.bias": x(e)},
            **{p + "3.weight": x(e, e), p + "3.bias": x(e), p + "4.weight": x(e), p + "4.bias": x(e)},
        }
    if kind == "ldpv2":
        return {
            **{p + "mlp.mlp.0.weight": x(e, d), p + "mlp.mlp.0.bias": x(e)},
            **{p + "mlp.mlp.2.weight": x(e, e), p + "mlp.mlp.2.bias": x(e)},
            **{p + "peg.peg.0.weight": x(e, 1, 3, 3), p + "peg.peg.0.bias": x(e)},
        }
    tensors = {
        **{p + "model.mlp.1.weight": x(e, d), p + "model.mlp.1.bias": x(e)},
        **{p + "model.mlp.3.weight": x(e, e), p + "model.mlp.3.bias": x(e)},
    }
    for i in (1, 2):
        b = f"{p}model.mb_block.{i}.block."
        tensors |= {b + "0.0.weight": x(e, 1, 3, 3), b + "2.0.weight": x(e, e, 1, 1)}
        tensors |= {b + f"{norm}.{part}": x(e) for norm in ("0.1", "2.1") for part in ("weight", "bias")}
        tensors |= {b + "1.fc1.weight": x(8, e, 1, 1), b + "1.fc1.bias": x(8)}
        tensors |= {b + "1.fc2.weight": x(e, 8, 1, 1), b + "1.fc2.bias": x(e)}
    return tensors


@pytest.mark.parametrize("kind", ["mlp_norm", "ldp", "ldpv2"])
def test_other_projectors(tmp_path: Path, kind: str) -> None:
    clip, projector = prepared(tmp_path)
    tensors = projector_of(kind, SPEC)
    write_safetensors(projector, tensors, "f32")
    file = read_gguf(convert(clip, projector, tmp_path, wanted_type="mlp" if kind == "mlp_norm" else kind))
    assert file.kv["clip.projector_type"] == {"mlp_norm": "mlp"}.get(kind, kind)
    found = {name for name in file.tensors if name.startswith("mm.")}
    assert len(found) == len(tensors)
    if kind == "mlp_norm":
        assert file.kinds["mm.1.weight"] == "F32"
        assert file.kinds["mm.3.weight"] == "F16"
    if kind == "ldpv2":
        assert file.tensors["mm.model.peg.0.weight"].shape == (SPEC.n_embd, 3, 3)
        assert file.kinds["mm.model.peg.0.weight"] == "F16"
        assert "mm.model.mlp.2.bias" in found
    if kind == "ldp":
        assert file.tensors["mm.model.mb_block.1.block.1.fc1.weight"].shape == (8, SPEC.n_embd)


def test_projector_type_is_checked(tmp_path: Path) -> None:
    clip, projector = prepared(tmp_path)
    with pytest.raises(CheckpointError, match="of type mlp, --projector-type says ldp"):
        convert(clip, projector, tmp_path, wanted_type="ldp")


Change = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.mm_projector.2.bias"), "'mm.2.bias' is missing"),
        (lambda t: t.pop("model.mm_projector.2.weight"), "no projector of a known type"),
        (lambda t: t.pop("model.mm_projector.0.weight"), "no projector of a known type"),
        (
            lambda t: t.update({"model.mm_projector.0.weight": np.ones((64, 31), np.float32)}),
            "right vision tower",
        ),
        (
            lambda t: t.update({"model.mm_projector.0.bias": np.ones(63, np.float32)}),
            r"shape \[63\], need \[64\]",
        ),
        (lambda t: t.update({"model.mm_projector.9.bias": np.ones(63, np.float32)}), "unexpected tensors"),
        (lambda t: t.update({"model.image_newline": np.ones(63, np.float32)}), "a vector of 64"),
        (lambda t: t["model.mm_projector.0.bias"].__setitem__(1, np.inf), "NaN or infinity"),
        (lambda t: t["model.mm_projector.0.weight"].__setitem__((1, 1), 1e6), "does not fit f16"),
    ],
)
def test_bad_projectors(tmp_path: Path, change: Change, text: str) -> None:
    clip, projector = prepared(tmp_path)
    tensors = projector_tensors(SPEC)
    change(tensors)
    write_safetensors(projector, tensors, "f32")
    with pytest.raises(CheckpointError, match=text):
        convert(clip, projector, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("vision_model.encoder.layers.2.mlp.fc2.bias"), "is missing"),
        (lambda t: t.pop("vision_model.embeddings.patch_embedding.weight"), "no vision tower"),
        (lambda t: t.pop("vision_model.embeddings.class_embedding"), "class_embedding' is missing"),
        (lambda t: t.pop("vision_model.pre_layrnorm.bias"), r"pre_layrnorm\.bias' is missing"),
        (
            lambda t: t.update({"vision_model.encoder.layers.3.mlp.fc2.bias": np.ones(3, np.float32)}),
            "does not explain",
        ),
        (lambda t: t.update({"vision_model.pre_layrnorm.bias": np.ones(3, np.float32)}), r"need \[32\]"),
    ],
)
def test_bad_towers(tmp_path: Path, change: Change, text: str) -> None:
    clip, projector = prepared(tmp_path)
    tensors = vision_tensors(SPEC)
    change(tensors)
    write_safetensors(clip / "model.safetensors", tensors, "f32")
    with pytest.raises(CheckpointError, match=text):
        convert(clip, projector, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("image_size", 13, "less than patch_size"),
        ("image_size", 70, r"need \[26, 32\]"),
        ("hidden_size", 33, "does not divide"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", 10**9, "need an integer in 1..512"),
        ("num_hidden_layers", "3", "is '3'"),
        ("layer_norm_eps", 0, "need a number above 0"),
        ("hidden_act", "relu", "hidden_act 'relu'"),
        ("num_channels", 1, "num_channels"),
    ],
)
def test_bad_configs(tmp_path: Path, key: str, value: Any, text: str) -> None:
    clip, projector = prepared(tmp_path, layout="vision")
    edit(clip / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=text):
        convert(clip, projector, tmp_path)


def test_config_layout_flags(tmp_path: Path, script) -> None:
    clip, projector = prepared(tmp_path)
    run = (
        "convert_image_encoder_to_gguf",
        "-m",
        clip,
        "--llava-projector",
        projector,
        "-o",
        tmp_path / "out",
    )
    assert "neither a CLIP model" in failure(script(*run, "--clip-model-is-vision"))
    assert script(*run, "--clip-model-is-openclip").returncode == 0
    write_clip_folder(clip, SPEC, layout="vision")
    assert "no vision_config" in failure(script(*run, "--clip-model-is-openclip"))
    assert script(*run, "--clip-model-is-vision").returncode == 0
    failure(script(*run, "--clip-model-is-openclip", "--clip-model-is-vision"), code=2)


def test_mean_and_std(tmp_path: Path, script) -> None:
    clip, projector = prepared(tmp_path)
    edit(clip / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.3])
    run = ("convert_image_encoder_to_gguf", "-m", clip, "--llava-projector", projector, "-o", tmp_path)
    assert script(*run).returncode == 0
    np.testing.assert_allclose(
        read_gguf(tmp_path / "mmproj-model-f16.gguf").kv["clip.vision.image_mean"], [0.5, 0.4, 0.3]
    )
    clip_mean = ("0.48145466", "0.4578275", "0.40821073")  # equal to CLIP's own: asked for, so obeyed
    assert script(*run, "--image-mean", *clip_mean, "--image-std", "1", "2", "3").returncode == 0
    kv = read_gguf(tmp_path / "mmproj-model-f16.gguf").kv
    np.testing.assert_allclose(kv["clip.vision.image_mean"], [float(x) for x in clip_mean], rtol=1e-6)
    np.testing.assert_allclose(kv["clip.vision.image_std"], [1, 2, 3])
    assert "three numbers" in failure(script(*run, "--image-std", "1", "0", "1"))
    assert "three numbers" in failure(script(*run, "--image-std", "1", "nan", "1"))
    failure(script(*run, "--image-std", "1", "2"), code=2)


def test_refused_and_missing_flags(tmp_path: Path, script) -> None:
    clip, projector = prepared(tmp_path)
    run = ("convert_image_encoder_to_gguf", "-m", clip)
    assert "--llava-projector is needed" in failure(script(*run), code=2)
    assert "--text-only" in failure(script(*run, "--text-only", "--llava-projector", projector), code=2)
    failure(script(*run, "--llava-projector", projector, "--bigendian"), code=2)
    failure(script(*run, "--llava-projector", projector, "--projector-type", "resampler"), code=2)
    assert "no such file" in failure(script(*run, "--llava-projector", tmp_path / "nope")).lower()


def test_script_output(tmp_path: Path, script) -> None:
    """stdout is the path and nothing else; without -o the file lands in the CLIP folder; --verbose tells each tensor."""
    clip, projector = prepared(tmp_path)
    result = script(
        "convert_image_encoder_to_gguf", "-m", clip, "--llava-projector", projector, "--vision-only"
    )
    assert result.returncode == 0
    assert result.stdout == f"{clip / 'mmproj-model-f16.gguf'}\n"
    assert "57 tensors" in result.stderr
    assert "v.blk.0.ffn_down.weight" not in result.stderr
    run = (
        "convert_image_encoder_to_gguf",
        "-m",
        clip,
        "--llava-projector",
        projector,
        "--output-dir",
        tmp_path / "o",
    )
    result = script(*run, "--use-f32", "--verbose")
    assert result.stdout == f"{tmp_path / 'o' / 'mmproj-model-f32.gguf'}\n"
    assert "v.blk.0.ffn_down.weight" in result.stderr


def test_llava_folder_given_as_clip_folder(tmp_path: Path) -> None:
    _, projector = prepared(tmp_path)
    with pytest.raises(CheckpointError, match="neither a CLIP model"):
        convert(tmp_path / "llava", projector, tmp_path)
