"""llava_surgery: the projector and the tower, wherever they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import failure
from tiny import (
    TinySpec,
    language_tensors,
    projector_tensors,
    vision_tensors,
    write_llava_checkpoint,
    write_shards,
    write_tensors,
)

from pyllava.convert.checkpoints.checkpoint import Checkpoint
from pyllava.convert.errors import CheckpointError
from pyllava.convert.surgery import split_off

SPEC = TinySpec()


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with Checkpoint([path]) as checkpoint:
        return {name: t.rows(0, t.n_rows).reshape(t.shape) for name, t in checkpoint.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_projector_from_every_format(tmp_path: Path, fmt: str, shards: int, dtype: str) -> None:
    spec = TinySpec(dtype=dtype)
    write_llava_checkpoint(tmp_path, spec, fmt=fmt, shards=shards)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert split_off(tmp_path, tmp_path) == [tmp_path / "llava.projector"]
    assert_same(tensors_of(tmp_path / "llava.projector"), projector_tensors(spec))
    with Checkpoint([tmp_path / "llava.projector"]) as checkpoint:
        assert {t.dtype for t in checkpoint.values()} == {"f32"}
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "llava.projector"}
    assert after == before


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_projector_split_over_shards(tmp_path: Path, fmt: str, index: bool) -> None:
    def shard_of(name: str) -> int:
        return int("mm_projector.2" in name or name.endswith("mm_projector.0.bias"))

    write_llava_checkpoint(tmp_path, SPEC, fmt=fmt, shards=2, index=index, shard_of=shard_of)
    split_off(tmp_path, tmp_path)
    assert_same(tensors_of(tmp_path / "llava.projector"), projector_tensors(SPEC))


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_projector_file_beside(tmp_path: Path, name: str, alone: bool) -> None:
    if not alone:
        write_llava_checkpoint(tmp_path, SPEC, projector=False)
    write_tensors(tmp_path / name, projector_tensors(SPEC), "f16")
    split_off(tmp_path, tmp_path)
    assert set(tensors_of(tmp_path / "llava.projector")) == set(projector_tensors(SPEC))


def test_shards_win_over_the_file_beside(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    write_tensors(tmp_path / "mm_projector.bin", projector_tensors(TinySpec(seed=5)), "f32")
    split_off(tmp_path, tmp_path)
    assert_same(tensors_of(tmp_path / "llava.projector"), projector_tensors(SPEC))


def test_lora_release(tmp_path: Path) -> None:
    tensors = {"base_model.model." + name: array for name, array in projector_tensors(SPEC).items()}
    write_tensors(tmp_path / "non_lora_trainables.bin", tensors, "f32")
    split_off(tmp_path, tmp_path)
    assert_same(tensors_of(tmp_path / "llava.projector"), projector_tensors(SPEC))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tower_gets_names_that_clip_knows(tmp_path: Path, dtype: str) -> None:
    """BakLLaVA: `vision_model....`, in the type it was stored in; added_tokens.json stays."""
    spec = TinySpec(dtype=dtype)
    write_llava_checkpoint(tmp_path, spec, fmt="bin", tower=True, added={"<pad>": spec.n_vocab})
    assert [path.name for path in split_off(tmp_path, tmp_path)] == ["llava.projector", "llava.clip"]
    assert_same(tensors_of(tmp_path / "llava.clip"), vision_tensors(spec))
    with Checkpoint([tmp_path / "llava.clip"]) as checkpoint:
        assert {t.dtype for t in checkpoint.values()} == {dtype}
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<pad>": spec.n_vocab}


@pytest.mark.parametrize("prefix", ["multi_modal_projector.", "model.multi_modal_projector."])
def test_hugging_face_names(tmp_path: Path, prefix: str) -> None:
    tensors = {
        name.replace("model.mm_projector.0", prefix + "linear_1").replace(
            "model.mm_projector.2", prefix + "linear_2"
        ): x
        for name, x in projector_tensors(SPEC).items()
    }
    tensors["image_newline"] = np.arange(SPEC.n_embd, dtype=np.float32)
    write_shards(tmp_path, {**language_tensors(SPEC), **tensors}, "f32")
    split_off(tmp_path, tmp_path)
    wanted = {**projector_tensors(SPEC), "model.image_newline": tensors["image_newline"]}
    assert_same(tensors_of(tmp_path / "llava.projector"), wanted)


def test_output_folder(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path / "model", SPEC)
    split_off(tmp_path / "model", tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "llava.projector").exists()
    assert not (tmp_path / "model" / "llava.projector").exists()


def test_no_projector_is_an_error(tmp_path: Path, script) -> None:
    write_llava_checkpoint(tmp_path, SPEC, projector=False)
    line = failure(script("llava_surgery", "-m", tmp_path))
    assert "no projector" in line
    assert "model.embed_tokens.weight" in line
    assert "model.layers.* (18)" in line
    assert not (tmp_path / "llava.projector").exists()


def test_nothing_there(tmp_path: Path, script) -> None:
    assert "no checkpoint" in failure(script("llava_surgery", "-m", tmp_path))
    assert "not a folder" in failure(script("llava_surgery", "-m", tmp_path / "nowhere"))
    failure(script("llava_surgery"), code=2)


def test_missing_shard_is_no_reason_to_take_the_file_beside(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC, shards=2)
    write_tensors(tmp_path / "mm_projector.bin", projector_tensors(SPEC), "f32")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards missing"):
        split_off(tmp_path, tmp_path)


def test_nan_is_refused(tmp_path: Path) -> None:
    tensors = {**language_tensors(SPEC), **projector_tensors(SPEC)}
    tensors["model.mm_projector.2.bias"][3] = np.nan
    write_shards(tmp_path, tensors, "f32")
    with pytest.raises(Exception, match=r"model\.mm_projector\.2\.bias.*NaN"):
        split_off(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_output_is_plain_safetensors(tmp_path: Path) -> None:
    """The official library reads what we write."""
    numpy_files = pytest.importorskip("safetensors.numpy")
    write_llava_checkpoint(tmp_path, SPEC, fmt="bin")
    split_off(tmp_path, tmp_path)
    assert_same(numpy_files.load_file(tmp_path / "llava.projector"), projector_tensors(SPEC))
