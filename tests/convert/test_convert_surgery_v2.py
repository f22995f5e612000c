"""llava_surgery_v2: projector, newline and tower of LLaVA-1.5 and 1.6, and the tower's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from layouts import config_16, newline, write_16, write_hf, write_tower_config
from test_convert_surgery import assert_same, tensors_of
from tiny import (
    TinySpec,
    projector_tensors,
    vision_config,
    vision_tensors,
    write_llava_checkpoint,
    write_tensors,
)

from pyllava.convert.errors import CheckpointError
from pyllava.convert.llava_surgery_v2 import main
from pyllava.convert.vision_params import read_llava_facts, read_vision_params
from pyllava.convert.vit_config import write_vit_config

SPEC = TinySpec(dtype="bf16")


def wanted_projector(spec: TinySpec = SPEC) -> dict[str, Any]:
    return {**projector_tensors(spec), "model.image_newline": newline(spec)}


def everywhere(name: str) -> int:
    """Neighbours in different shards: the projector, the newline and the tower are spread over three."""
    return sum(name.encode()) % 3


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_llava_16(tmp_path: Path, fmt: str, shards: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_16(tmp_path, SPEC, fmt=fmt, shards=shards, shard_of=everywhere)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["-C", "-m", str(tmp_path)]) == 0
    files = ("llava.projector", "llava.clip")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in files]
    assert_same(tensors_of(tmp_path / "llava.projector"), wanted_projector())
    assert_same(tensors_of(tmp_path / "llava.clip"), vision_tensors(SPEC))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name not in files} == before


def test_the_same_bytes_again(tmp_path: Path) -> None:
    """Whatever lies there from before: nothing stale stays in either file."""
    write_16(tmp_path / "a", SPEC)
    write_16(tmp_path / "b", SPEC, fmt="bin", shards=3, shard_of=everywhere)
    write_tensors(tmp_path / "b" / "llava.clip", {"vision_model.old": newline(SPEC)}, "f32")
    for folder in ("a", "b", "b"):
        assert main(["-C", "-m", str(tmp_path / folder)]) == 0
    for name in ("llava.projector", "llava.clip"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("newer", [False, True])
def test_hugging_face_names(tmp_path: Path, newer: bool) -> None:
    write_hf(tmp_path, SPEC, tiles=True, newer=newer)
    assert main(["-C", "-m", str(tmp_path)]) == 0
    assert_same(tensors_of(tmp_path / "llava.projector"), wanted_projector())
    assert_same(tensors_of(tmp_path / "llava.clip"), vision_tensors(SPEC))


def test_without_c_the_tower_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_16(tmp_path, SPEC)
    assert main(["-m", str(tmp_path)]) == 0
    assert "-C (--clean-vision-tower) writes llava.clip" in capsys.readouterr().err
    assert not (tmp_path / "llava.clip").exists()


def test_llava_15_has_no_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    assert main(["-C", "-m", str(tmp_path)]) == 0
    assert "holds no vision tower" in capsys.readouterr().err
    assert_same(tensors_of(tmp_path / "llava.projector"), projector_tensors(SPEC))


def test_no_projector_fails(tmp_path: Path, script) -> None:
    write_llava_checkpoint(tmp_path, SPEC, projector=False)
    line = failure(script("llava_surgery_v2", "-C", "-m", tmp_path))
    assert "no projector" in line
    assert "is this a LLaVA model?" in line
    assert not (tmp_path / "llava.projector").exists()


def test_usage(script, tmp_path: Path) -> None:
    assert "-m/--model --write-vit-config is required" in failure(script("llava_surgery_v2"), code=2)
    line = failure(script("llava_surgery_v2", "-C", "--write-vit-config", tmp_path), code=2)
    assert "-C: needs -m DIR" in line


# The tower's config


@pytest.mark.parametrize("known", ["openai/clip-vit-large-patch14-336", "/data/CLIP-ViT-Large-Patch14-336/"])
def test_published_tower(tmp_path: Path, known: str) -> None:
    """Nothing but the model's own config.json: what LLaVA-1.6 needs, all 24 layers of it."""
    model = tmp_path / "llava-v1.6-vicuna-7b"
    model.mkdir()
    pairs = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = {**config_16(SPEC), "mm_vision_tower": known, "image_grid_pinpoints": pairs}
    (model / "config.json").write_text(json.dumps(config))
    path = write_vit_config(model, tmp_path / "vit")
    assert path == tmp_path / "vit" / "config.json"
    assert json.loads(path.read_text()) == {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": pairs,
        "image_crop_resolution": 224,
        "image_split_resolution": 224,
    }
    tower = read_vision_params(tmp_path / "vit", layout="vision", mean=None, std=None)
    facts = read_llava_facts(tmp_path / "vit" / "llava.projector", tmp_path / "vit", tower)
    assert facts.feature_layers == (23,)
    assert len(facts.pinpoints) == 10


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_tower_of_a_local_folder(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_16(tmp_path / "m", SPEC)
    write_tower_config((tmp_path if place == "beside" else model) / "clip-tiny", SPEC)
    assert main(["-C", "-m", str(model)]) == 0
    assert main(["--write-vit-config", str(model), "-o", str(tmp_path / "deep" / "vit")]) == 0
    assert "no llava.clip" not in capsys.readouterr().err
    found = read_vision_params(tmp_path / "deep" / "vit", layout="vision", mean=None, std=None)
    assert (found.n_embd, found.n_ff, found.n_layer, found.image_size) == (32, 96, 3, 56)


def test_hugging_face_config(tmp_path: Path) -> None:
    """`vision_config` with the settings of transformers translated, and its missing keys filled in."""
    write_hf(tmp_path / "m", SPEC, tiles=True, drop=("hidden_act", "layer_norm_eps"))
    write_vit_config(tmp_path / "m", tmp_path / "vit")
    table = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert {key: table[key] for key in vision_config(SPEC)} == vision_config(SPEC)
    assert table["mm_patch_merge_type"] == "spatial_unpad"
    assert table["image_aspect_ratio"] == "anyres"


def test_sizes_are_checked(tmp_path: Path, script) -> None:
    """A config that does not describe llava.clip is refused: a size, and a layer too few."""
    model = write_16(tmp_path / "m", SPEC)
    assert main(["-C", "-m", str(model)]) == 0
    write_tower_config(tmp_path / "clip-tiny", TinySpec(v_embd=64, dtype="bf16"))
    line = failure(script("llava_surgery_v2", "--write-vit-config", model, cwd=tmp_path))
    assert "shape [32], need [64]" in line
    write_tower_config(tmp_path / "clip-tiny", TinySpec(v_layer=2, dtype="bf16"))
    line = failure(script("llava_surgery_v2", "--write-vit-config", model, cwd=tmp_path))
    assert "16 tensors that config.json does not explain" in line
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower is 'google/siglip-so400m': neither a"),
        ({"mm_vision_tower": None}, "mm_vision_tower is None: neither a folder near"),
        ({"mm_vision_tower": "../.."}, r"mm_vision_tower is '\.\./\.\.': neither a folder near"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints are missing"),
        ({"image_grid_pinpoints": [[56]]}, "pairs of sizes"),
        ({"mm_vision_select_layer": -9}, "vision feature layer -9 of a tower with 3 layers"),
    ],
)
def test_configs_that_say_too_little(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**config_16(SPEC), **change}))
    write_tower_config(tmp_path / "clip-tiny", SPEC)
    with pytest.raises(CheckpointError, match=text):
        write_vit_config(model, tmp_path / "vit")
    assert not (tmp_path / "vit").exists()


def test_not_a_llava_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_vit_config(tmp_path, tmp_path / "vit")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="a model of type 'llama' without LLaVA's settings"):
        write_vit_config(tmp_path, tmp_path / "vit")
    with pytest.raises(CheckpointError, match="not a folder"):
        write_vit_config(tmp_path / "nowhere", tmp_path / "vit")
