"""Against torch and transformers where they are installed: real torch.save files, real folders, real permutations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_gguf
from tiny import (
    TinySpec,
    language_config,
    language_tensors,
    projector_tensors,
    vision_config,
    vision_tensors,
    write_llava_checkpoint,
    write_tokenizer,
    write_torch_zip,
)

from pyllava.convert.checkpoints.checkpoint import open_file
from pyllava.convert.errors import CheckpointError
from pyllava.convert.language_model import Options, convert
from pyllava.convert.projector_file import convert as convert_tower
from pyllava.convert.surgery import split_off

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference
SPEC = TinySpec()


def read(path: Path) -> dict[str, np.ndarray]:
    file, tensors = open_file(path)
    with file:
        return {name: t.rows(0, t.n_rows).reshape(t.shape) for name, t in tensors.items() if t.dtype != "i64"}


def tables() -> dict[str, Any]:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    return {
        "plain": {"x": base, "y": base[0], "scalar": torch.tensor(3.0)},
        "bf16": {"x": base.to(torch.bfloat16) / 7},
        "f16": {"x": base.to(torch.float16) / 7},
        "f64": {"x": base.to(torch.float64) / 8},
        "shared": {"a": base, "b": base[1:3], "c": base[:, 2:9], "d": base},
        "strided": {"t": base.t(), "s": base[::2, ::3], "p": base.reshape(5, 3, 4).permute(2, 0, 1), "e": base[:, :1].expand(5, 4)},
        "parameter": {"w": torch.nn.Parameter(base), "n": torch.nn.Parameter(base, requires_grad=False)},
        "module": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict(),
        "mixed": {"x": base, "ids": torch.arange(5), "empty": torch.zeros(0, 4), "epoch": 3, "name": "x"},
    }  # fmt: skip


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_torch_save(tmp_path: Path, name: str, protocol: int) -> None:
    table = tables()[name]
    torch.save(table, tmp_path / "x.bin", pickle_protocol=protocol)
    found = read(tmp_path / "x.bin")
    wanted = {k: v for k, v in table.items() if isinstance(v, torch.Tensor) and v.dtype != torch.int64}
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].shape == tuple(value.shape)
        np.testing.assert_array_equal(found[key], value.detach().float().numpy(), key)


def test_random_views(tmp_path: Path) -> None:
    """Hundreds of views of one storage, made by torch, saved by torch, read by us in pieces."""
    rng = np.random.RandomState(5)
    base = torch.arange(7 * 11 * 5, dtype=torch.float32).reshape(7, 11, 5)
    table = {}
    for i in range(300):
        x = base.permute(*rng.permutation(3).tolist())
        for axis in range(3):
            start = rng.randint(x.shape[axis])
            x = x.narrow(axis, start, rng.randint(1, x.shape[axis] - start + 1))
        table[f"v{i}"] = x[:: rng.randint(1, 4)]
    torch.save(table, tmp_path / "x.bin")
    file, tensors = open_file(tmp_path / "x.bin")
    with file:
        for name, value in table.items():
            rows = [tensors[name].rows(i, i + 1) for i in range(len(value))]
            np.testing.assert_array_equal(np.concatenate(rows).reshape(value.shape), value.numpy())


def test_torch_reads_what_the_tests_write(tmp_path: Path) -> None:
    """The tests' own torch-zip writer is what torch expects."""
    write_torch_zip(tmp_path / "x.bin", projector_tensors(SPEC), "bf16")
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    for name, array in projector_tensors(TinySpec(dtype="bf16")).items():
        np.testing.assert_array_equal(found[name].float().numpy(), array)


def test_refused_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old format"):
        read(path)
    torch.save({"x": torch.zeros(3, dtype=torch.complex64)}, path)
    with pytest.raises(CheckpointError, match="ComplexFloatStorage"):
        read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"torch\.nn"):
        read(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="no table of tensors"):
        read(path)
    torch.save({"x": torch._neg_view(torch.ones(3))}, path)
    with pytest.raises(CheckpointError, match="extra state"):
        read(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_language_model_saved_by_transformers(tmp_path: Path, tied: bool, dtype: str) -> None:
    """save_pretrained in several shards -> the same file as from our own writer."""
    transformers = pytest.importorskip("transformers")
    spec = TinySpec(tied=tied, dtype={"float32": "f32", "bfloat16": "bf16"}[dtype])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**language_config(spec)))
    state = {name: torch.from_numpy(array) for name, array in language_tensors(spec).items()}
    model.load_state_dict(state, strict=not tied)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    write_tokenizer(tmp_path / "m", spec)
    theirs = convert(tmp_path / "m", Options(model_name="x"))
    write_llava_checkpoint(tmp_path / "ours", spec, projector=False)
    ours = convert(tmp_path / "ours", Options(model_name="x"))
    assert theirs.read_bytes() == ours.read_bytes()


def test_llava_saved_by_transformers(tmp_path: Path) -> None:
    """The llava-hf layout: one folder gives language model, projector and tower."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_config(SPEC)),
        text_config=transformers.LlamaConfig(**language_config(SPEC)),
        image_token_index=5,
        projector_hidden_act="gelu",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m", SPEC)
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    written = split_off(tmp_path / "m", tmp_path / "m")
    assert [path.name for path in written] == ["llava.projector", "llava.clip"]
    clip = tmp_path / "clip"
    clip.mkdir()
    (tmp_path / "m" / "llava.clip").rename(clip / "model.safetensors")
    (clip / "config.json").write_text(json.dumps(vision_config(SPEC)))
    tower = read_gguf(convert_tower(clip, tmp_path / "m" / "llava.projector", tmp_path, outtype="f32"))
    llm = read_gguf(convert(tmp_path / "m", Options(skip_unknown=True)))
    ends = {
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "mm.2.bias": "multi_modal_projector.linear_2.bias",
        "v.blk.1.ffn_up.weight": "encoder.layers.1.mlp.fc2.weight",
    }
    for name, end in ends.items():
        (source,) = [value for key, value in state.items() if key.endswith(end)]
        np.testing.assert_array_equal(tower.tensors[name], source)
    (down,) = [value for key, value in state.items() if key.endswith("layers.1.mlp.down_proj.weight")]
    np.testing.assert_array_equal(llm.tensors["blk.1.ffn_down.weight"], down.astype(np.float16))
    assert tower.kv["clip.vision.feature_layer"] == [2]
    assert len(llm.tensors) == 21


def test_clip_saved_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_config(SPEC)))
    known = set(model.state_dict())
    state = {
        (name if name in known else name.removeprefix("vision_model.")): torch.from_numpy(array)
        for name, array in vision_tensors(SPEC).items()
    }
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "clip")
    write_llava_checkpoint(tmp_path / "llava", SPEC)
    split_off(tmp_path / "llava", tmp_path / "llava")
    path = convert_tower(tmp_path / "clip", tmp_path / "llava" / "llava.projector", tmp_path, outtype="f32")
    file = read_gguf(path)
    wanted = vision_tensors(SPEC)["vision_model.encoder.layers.2.mlp.fc1.weight"]
    np.testing.assert_array_equal(file.tensors["v.blk.2.ffn_down.weight"], wanted)
    assert file.kv["clip.vision.feed_forward_length"] == SPEC.v_ff


def test_fast_tokenizer_of_the_tokenizers_library(tmp_path: Path) -> None:
    """tokenizer.json read by us and by the tokenizers library: the same ids."""
    tokenizers = pytest.importorskip("tokenizers")
    from test_convert_vocabulary import fast_tokenizer, merged, texts
    from tiny import tokenizer_model

    from pyllava.convert.tokenizer_files import read_vocabulary

    (tmp_path / "tokenizer.json").write_text(json.dumps(fast_tokenizer(tokenizer_model(SPEC.n_vocab))))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = read_vocabulary(tmp_path, ("hfft",), {"bos": 1, "eos": 2})
    for text in texts():
        if "<" not in text and text:
            assert merged(ours, text) == theirs.encode(text).ids, text
