"""The commands of llama.cpp's README for LLaVA-1.5 and 1.6, on checkpoints made here; only paths of programs
are changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_gguf
from layouts import newline, pinpoints, write_16, write_tower_config
from tiny import TinySpec, write_clip_folder, write_llava_checkpoint

SPEC = TinySpec(dtype="bf16")
PYTHON = f"{sys.executable} {ROOT / 'convert'}"
CLI = f"{sys.executable} -m pyllava"

SEED_15 = f"""
{PYTHON}/llava_surgery.py -m ../llava-v1.5-7b
{PYTHON}/convert_image_encoder_to_gguf.py -m ../clip-vit-large-patch14-336 \\
    --llava-projector ../llava-v1.5-7b/llava.projector --output-dir ../llava-v1.5-7b
{PYTHON}/convert_legacy_llama.py ../llava-v1.5-7b --skip-unknown
{CLI} -m ../llava-v1.5-7b/ggml-model-f16.gguf --mmproj ../llava-v1.5-7b/mmproj-model-f16.gguf \\
    --image ../some-image.jpg
"""
SEED_16 = f"""
{PYTHON}/llava_surgery_v2.py -C -m ../llava-v1.6-vicuna-7b/
mkdir vit
cp ../llava-v1.6-vicuna-7b/llava.clip vit/pytorch_model.bin
cp ../llava-v1.6-vicuna-7b/llava.projector vit/
CONFIG
{PYTHON}/convert_image_encoder_to_gguf.py -m vit --llava-projector vit/llava.projector --output-dir vit \\
    --clip-model-is-vision
{PYTHON}/convert_legacy_llama.py ../llava-v1.6-vicuna-7b/ --skip-unknown
{CLI} -m ../llava-v1.6-vicuna-7b/ggml-model-f16.gguf --mmproj vit/mmproj-model-f16.gguf \\
    --image ../some-image.jpg -c 4096
"""
WRITTEN = f"{PYTHON}/llava_surgery_v2.py --write-vit-config ../llava-v1.6-vicuna-7b/"
BY_HAND = "cp ../config_vit.json vit/config.json"  # where the README downloads one


@pytest.fixture
def work(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "examples" / "scene.png", tmp_path / "some-image.jpg")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def shell(commands: str, folder: Path) -> str:
    """stdout of the commands, each of which must succeed."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        ["sh", "-e", "-c", commands], cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_llava_15(work: Path) -> None:
    write_llava_checkpoint(work.parent / "llava-v1.5-7b", SPEC, fmt="bin", shards=2)
    write_clip_folder(work.parent / "clip-vit-large-patch14-336", SPEC, fmt="bin")
    lines = shell(SEED_15, work).splitlines()
    assert lines[:3] == [
        f"../llava-v1.5-7b/{name}"
        for name in ("llava.projector", "mmproj-model-f16.gguf", "ggml-model-f16.gguf")
    ]
    assert len(lines) > 3  # an answer


@pytest.mark.parametrize("config", [WRITTEN, BY_HAND], ids=["written", "by-hand"])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_llava_16(work: Path, fmt: str, config: str) -> None:
    """The projector in two shards, the newline in another than the projector, the tower over both."""

    def shard_of(name: str) -> int:
        return int("mm_projector.2" in name or "layers.1." in name)

    folder = work.parent / "llava-v1.6-vicuna-7b"
    write_16(folder, SPEC, fmt=fmt, shards=2, shard_of=shard_of)
    write_tower_config(work.parent / "clip-tiny", SPEC)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    by_hand = (
        '{"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3, '
        '"image_size": 56, "patch_size": 14, "projection_dim": 16, "hidden_act": "quick_gelu", '
        '"layer_norm_eps": 1e-5, '
        f'"image_grid_pinpoints": {pinpoints(SPEC)}, "mm_patch_merge_type": "spatial_unpad", '
        '"image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224, '
        '"mm_projector_type": "mlp2x_gelu"}'
    )
    (work.parent / "config_vit.json").write_text(by_hand)
    lines = shell(SEED_16.replace("CONFIG", config), work).splitlines()
    assert len(lines) > 4 + (config == WRITTEN)  # the files written, then an answer
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    file = read_gguf(work / "vit" / "mmproj-model-f16.gguf")
    assert file.kv["clip.vision.image_grid_pinpoints"] == [n for pair in pinpoints(SPEC) for n in pair]
    assert file.kv["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert file.kv["clip.vision.image_aspect_ratio"] == "anyres"
    assert file.kv["clip.vision.image_crop_resolution"] == 224
    assert file.kv["clip.vision.block_count"] == 3
    assert file.kv["clip.vision.feature_layer"] == [2]
    np.testing.assert_array_equal(file.tensors["model.image_newline"], newline(SPEC))
    assert len(file.tensors) == 5 + 3 * 16 + 4 + 1
