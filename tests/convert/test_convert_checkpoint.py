"""Finding the files of a checkpoint: folders, shards, indexes, and what is no checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import write_shards, write_tensors

from pyllava.convert import language_model, llava_model
from pyllava.convert.checkpoints.checkpoint import checkpoint_files, open_checkpoint, open_file, summary
from pyllava.convert.checkpoints.dtypes import STORED
from pyllava.convert.checkpoints.json_file import read_json
from pyllava.convert.checkpoints.safetensors_file import DTYPES
from pyllava.convert.errors import CheckpointError, NoCheckpoint

TENSORS = {f"t{i}": np.full((2, 3), i, dtype=np.float32) for i in range(6)}


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_files(folder)]


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, fmt: str, index: bool) -> None:
    write_shards(tmp_path, TENSORS, "f32", fmt=fmt, shards=3, index=index)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(TENSORS)
        assert len(checkpoint.files) == 3
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(checkpoint[name].rows(0, 2), array)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, "f32", fmt="bin", shards=2)
    write_shards(tmp_path, TENSORS, "f32")
    assert names(tmp_path) == ["model.safetensors"]


def test_other_names(tmp_path: Path) -> None:
    write_tensors(tmp_path / "consolidated.00.pth", TENSORS, "f32")
    assert names(tmp_path) == ["consolidated.00.pth"]
    write_tensors(tmp_path / "consolidated.safetensors", TENSORS, "f32")
    assert names(tmp_path) == ["consolidated.safetensors"]


def test_index_decides_which_shards(tmp_path: Path) -> None:
    """Shards with any names, as an index lists them; a projector file beside is not one of them."""
    write_tensors(tmp_path / "first.safetensors", {"a": TENSORS["t0"]}, "f32")
    write_tensors(tmp_path / "second.safetensors", {"b": TENSORS["t1"]}, "f32")
    write_tensors(tmp_path / "mm_projector.bin", {"c": TENSORS["t2"]}, "f32")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}))
    assert names(tmp_path) == ["first.safetensors", "second.safetensors"]
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "second.safetensors", "b": "first.safetensors"}}))
    with pytest.raises(CheckpointError, match="'a' is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None, ["x"]]
)
def test_index_may_not_lead_out(tmp_path: Path, shard: object) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS, "f32")
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="no file name in this folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("table", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_empty_index(tmp_path: Path, table: object) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    for index in (True, False):
        write_shards(tmp_path, TENSORS, "f32", shards=3, index=index)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match="1 of 3 shards missing, first model-00002"):
            open_checkpoint(tmp_path)


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, "f32", shards=2, index=False)
    write_shards(tmp_path, TENSORS, "f32", shards=3, index=False)
    with pytest.raises(CheckpointError, match="more than one checkpoint"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, "f32", shards=2, index=False)
    write_tensors(tmp_path / "model-00002-of-00002.safetensors", TENSORS, "f32")
    with pytest.raises(CheckpointError, match="'t0' is both in"):
        open_checkpoint(tmp_path)


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="an empty folder"):
        checkpoint_files(tmp_path)
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(NoCheckpoint, match=r"found README\.md"):
        checkpoint_files(tmp_path)
    with pytest.raises(FileNotFoundError):
        checkpoint_files(tmp_path / "nowhere")


def test_not_a_regular_file(tmp_path: Path) -> None:
    """A FIFO must not be waited for."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_file(Path("/dev/zero"))


def test_links_are_followed(tmp_path: Path) -> None:
    """A download cache keeps its files elsewhere and links to them."""
    (tmp_path / "blobs").mkdir()
    write_shards(tmp_path / "blobs", TENSORS, "f32")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    with open_checkpoint(tmp_path / "snapshot") as checkpoint:
        assert len(checkpoint) == 6


def test_files_are_closed_after_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, "f32", shards=3, index=False)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"x" * 100)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    assert before in (0, len(os.listdir("/proc/self/fd")))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_json_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_summary() -> None:
    many = [f"model.layers.{i}.x.weight" for i in range(12)] + ["lm_head.weight"]
    assert summary(many) == "lm_head.weight, model.layers.* (12)"
    assert summary([]) == "nothing"


# Adapters and quantised weights


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}')
    write_tensors(tmp_path / "adapter_model.safetensors", TENSORS, "f32")
    with pytest.raises(
        NoCheckpoint, match=r"a LoRA adapter of 'lmsys/vicuna-7b-v1.5' .*merge it into its base"
    ):
        open_checkpoint(tmp_path)
    for convert in (convert_llava, convert_language):
        with pytest.raises(CheckpointError, match=r"a LoRA adapter of 'lmsys/vicuna-7b-v1\.5'"):
            convert(tmp_path)
    (tmp_path / "adapter_config.json").write_text("no JSON")
    with pytest.raises(NoCheckpoint, match=r"a LoRA adapter \(adapter_config.json\)"):
        open_checkpoint(tmp_path)


def convert_llava(folder: Path) -> None:
    llava_model.convert(folder, folder, llava_model.Options())


def convert_language(folder: Path) -> None:
    language_model.convert(folder, language_model.Options())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_an_adapter_that_is_not_merged_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write_shards(tmp_path, TENSORS, "f32")
    open_checkpoint(tmp_path).close()
    assert not caplog.records
    (tmp_path / name).write_text("{}")
    open_checkpoint(tmp_path).close()
    assert f"{name} is not merged: what is written is the model without it" in caplog.text


@pytest.mark.parametrize(
    ("name", "dtype", "config", "method"),
    [
        ("q_proj.qweight", "i32", {}, "GPTQ or AWQ"),
        ("q_proj.qweight", "i32", {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ("q_proj.qzeros", "i32", {"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ("q_proj.SCB", "f32", {}, "bitsandbytes"),
        ("q_proj.weight", "u8", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ("q_proj.weight.absmax", "f32", {}, "bitsandbytes"),
        ("q_proj.weight", "i8", {}, "i8"),
        ("q_proj.weight", "f8_e4m3", {}, "fp8"),
        ("q_proj.weight_scale_inv", "f32", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ("q_proj.weight_packed", "i32", {"quantization_config": 3}, "compressed-tensors"),
    ],
)
def test_quantised_weights_are_named(
    tmp_path: Path, name: str, dtype: str, config: dict[str, object], method: str
) -> None:
    kind = {value: key for key, value in DTYPES.items()}[dtype]
    size = STORED[dtype].itemsize
    header = json.dumps({name: {"dtype": kind, "shape": [8], "data_offsets": [0, 8 * size]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8 * size)
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=rf"quantised weights \({method}; '{name}'\): need the checkpoint"
    ):
        open_checkpoint(tmp_path)


def test_a_checkpoint_that_was_quantised_once_and_is_not_now(tmp_path: Path) -> None:
    """Merged and saved in 16 bits, with the config of its training."""
    write_tensors(tmp_path / "model.safetensors", {"q_proj.weight": TENSORS["t0"]}, "f16")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    open_checkpoint(tmp_path).close()
