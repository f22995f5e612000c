"""convert_legacy_llama: names, types, numbers, the q/k permutation, keys, flags and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Gguf, failure, read_gguf
from tiny import (
    TinySpec,
    bf16_bits,
    language_tensors,
    projector_tensors,
    rounded,
    write_llava_checkpoint,
    write_shards,
    write_tokenizer,
)

from pyllava.convert.encoding import decode, encode, tolerance
from pyllava.convert.errors import CheckpointError
from pyllava.convert.language_model import Options, convert, interleave
from pyllava.formats import BF16, F16, F32, Q8_0

SPEC = TinySpec()
LLAVA = Options(skip_unknown=True)


def expected(spec: TinySpec) -> dict[str, np.ndarray]:
    """The file's tensors in float32, written out by hand; q and k permuted row by row."""
    hf = language_tensors(spec)
    out = {
        "token_embd.weight": hf["model.embed_tokens.weight"],
        "output_norm.weight": hf["model.norm.weight"],
    }
    if not spec.tied:
        out["output.weight"] = hf["lm_head.weight"]
    for i in range(spec.n_layer):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        out[b + "attn_norm.weight"] = hf[p + "input_layernorm.weight"]
        out[b + "attn_q.weight"] = permuted(hf[p + "self_attn.q_proj.weight"], spec.n_head)
        out[b + "attn_k.weight"] = permuted(hf[p + "self_attn.k_proj.weight"], spec.n_head_kv)
        out[b + "attn_v.weight"] = hf[p + "self_attn.v_proj.weight"]
        out[b + "attn_output.weight"] = hf[p + "self_attn.o_proj.weight"]
        out[b + "ffn_norm.weight"] = hf[p + "post_attention_layernorm.weight"]
        out[b + "ffn_gate.weight"] = hf[p + "mlp.gate_proj.weight"]
        out[b + "ffn_up.weight"] = hf[p + "mlp.up_proj.weight"]
        out[b + "ffn_down.weight"] = hf[p + "mlp.down_proj.weight"]
    return out


def permuted(x: np.ndarray, n_head: int) -> np.ndarray:
    """Row by row: rotating the pair (i, i + half) in HF's order is rotating (2i, 2i + 1) in GGUF's."""
    dim = x.shape[0] // n_head
    out = np.empty_like(x)
    for head in range(n_head):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = x[head * dim + i]
            out[head * dim + 2 * i + 1] = x[head * dim + dim // 2 + i]
    return out


def assert_file(file: Gguf, spec: TinySpec, kind: str) -> None:
    wanted = expected(spec)
    assert set(file.tensors) == set(wanted)
    assert len(wanted) == 3 + 9 * spec.n_layer - int(spec.tied)
    for name, array in wanted.items():
        assert file.tensors[name].shape == array.shape, name
        own = kind if array.ndim == 2 else "f32"
        assert file.kinds[name] == own.upper(), name
        if own == "q8_0":
            bound = tolerance(array, Q8_0)
            assert (np.abs(file.tensors[name] - array) <= bound).all(), name
            assert np.abs(file.tensors[name] - array).max() > 0  # it was quantised
        else:
            np.testing.assert_array_equal(file.tensors[name], rounded(array, own), name)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_names_types_and_numbers(tmp_path: Path, fmt: str, dtype: str, outtype: str) -> None:
    spec = TinySpec(dtype=dtype)
    write_llava_checkpoint(tmp_path, spec, fmt=fmt)
    path = convert(tmp_path, Options(outtype=outtype, skip_unknown=True))
    assert path == tmp_path / f"ggml-model-{outtype}.gguf"
    file = read_gguf(path)
    assert_file(file, spec, outtype)
    assert file.kv["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[outtype]
    assert file.kv.get("general.quantization_version") == (2 if outtype == "q8_0" else None)


SHAPES = [
    TinySpec(n_head=4, n_head_kv=4),
    TinySpec(n_head=4, n_head_kv=1),
    TinySpec(tied=True),
    TinySpec(n_embd=96, n_head=6, n_head_kv=3, n_ff=96, n_layer=3),
    TinySpec(n_embd=40, n_head=4, n_head_kv=2, n_ff=72),
    TinySpec(n_layer=1, eps=1e-6, rope_theta=1e6, n_ctx=2048, dtype="bf16"),
]


@pytest.mark.parametrize("spec", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("shards", [1, 4])
def test_shapes_and_keys(tmp_path: Path, spec: TinySpec, shards: int) -> None:
    write_llava_checkpoint(tmp_path / "llava-v1.5-tiny", spec, fmt="bin", shards=shards)
    file = read_gguf(convert(tmp_path / "llava-v1.5-tiny", LLAVA))
    assert_file(file, spec, "f16")
    kv = {key: value for key, value in file.kv.items() if not key.startswith("tokenizer.")}
    assert kv.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(spec.eps)
    assert kv == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "llava-v1.5-tiny",
        "general.file_type": 1,
        "llama.vocab_size": spec.n_vocab,
        "llama.context_length": spec.n_ctx,
        "llama.embedding_length": spec.n_embd,
        "llama.block_count": spec.n_layer,
        "llama.feed_forward_length": spec.n_ff,
        "llama.rope.dimension_count": spec.head_dim,
        "llama.attention.head_count": spec.n_head,
        "llama.attention.head_count_kv": spec.n_head_kv,
        "llama.rope.freq_base": spec.rope_theta,
    }
    assert [kind.name for kind in file.types["llama.block_count"]] == ["UINT32"]
    assert [kind.name for kind in file.types["llama.rope.freq_base"]] == ["FLOAT32"]


def test_rows_that_no_block_divides_stay_f16(tmp_path: Path) -> None:
    spec = TinySpec(n_embd=40, n_head=4, n_ff=96)
    write_llava_checkpoint(tmp_path, spec)
    file = read_gguf(convert(tmp_path, Options(outtype="q8_0", skip_unknown=True)))
    assert file.kinds["blk.0.attn_q.weight"] == "F16"
    assert file.kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_permutation_is_the_one_that_rope_needs() -> None:
    """Rotating pairs (2i, 2i+1) of the permuted projection gives the permuted result of rotating (i, i + half)."""
    rng = np.random.RandomState(0)
    n_head, dim, n_embd = 3, 8, 16
    w = rng.standard_normal((n_head * dim, n_embd)).astype(np.float32)
    x = rng.standard_normal(n_embd)
    angle = 5.0 * 10000.0 ** (-np.arange(dim // 2) * 2.0 / dim)

    def rotate(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)

    hf = (w @ x).reshape(n_head, dim)
    hf_a, hf_b = rotate(hf[:, : dim // 2], hf[:, dim // 2 :])
    ours = (interleave(dim)(w) @ x).reshape(n_head, dim // 2, 2)
    our_a, our_b = rotate(ours[:, :, 0], ours[:, :, 1])
    np.testing.assert_allclose(our_a, hf_a)
    np.testing.assert_allclose(our_b, hf_b)
    np.testing.assert_array_equal(interleave(dim)(w), permuted(w, n_head))


def test_unknown_tensors(tmp_path: Path, script) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    line = failure(script("convert_legacy_llama", tmp_path))
    assert "Unexpected tensor name: 'model.mm_projector.0.weight'" in line
    assert "--skip-unknown" in line
    assert not list(tmp_path.glob("*.gguf*"))
    result = script("convert_legacy_llama", tmp_path, "--skip-unknown")
    assert result.stdout == f"{tmp_path / 'ggml-model-f16.gguf'}\n"
    assert "model.mm_projector.* (4)" in result.stderr


def test_skip_unknown_hides_no_misspelled_tensor(tmp_path: Path) -> None:
    tensors = language_tensors(SPEC)
    tensors["model.layers.1.mlp.gate_projj.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")
    write_llava_checkpoint(tmp_path, SPEC)
    write_shards(tmp_path, tensors, "f32")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight' is missing"):
        convert(tmp_path, LLAVA)


def test_plain_llama_needs_no_flag(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC, projector=False)
    tensors = language_tensors(SPEC)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_shards(tmp_path, tensors, "f32")
    assert_file(read_gguf(convert(tmp_path, Options())), SPEC, "f16")


def test_tied_model_leaves_a_stale_head_out(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, TinySpec(tied=True))
    untied = language_tensors(SPEC)
    write_shards(tmp_path, untied, "f32")
    assert_file(read_gguf(convert(tmp_path, LLAVA)), TinySpec(tied=True), "f16")


def test_untied_model_without_head(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    tensors = language_tensors(SPEC)
    del tensors["lm_head.weight"]
    write_shards(tmp_path, tensors, "f32")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        convert(tmp_path, LLAVA)


def test_attention_biases(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    tensors, rng = language_tensors(SPEC), np.random.RandomState(3)
    for i in range(SPEC.n_layer):
        for part, n in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{i}.self_attn.{part}_proj.bias"] = rng.standard_normal(n).astype(
                np.float32
            )
    write_shards(tmp_path, tensors, "f32")
    file = read_gguf(convert(tmp_path, LLAVA))
    for part, name, n_head in (("q", "attn_q", 4), ("k", "attn_k", 2)):
        source = tensors[f"model.layers.1.self_attn.{part}_proj.bias"][:, None]
        np.testing.assert_array_equal(file.tensors[f"blk.1.{name}.bias"], permuted(source, n_head)[:, 0])
    np.testing.assert_array_equal(
        file.tensors["blk.0.attn_output.bias"], tensors["model.layers.0.self_attn.o_proj.bias"]
    )


def test_qwen2(tmp_path: Path) -> None:
    """Keys under its own name, biases, and rows of q and k as they are."""
    spec = TinySpec(family="qwen2", tied=True)
    write_llava_checkpoint(tmp_path, spec)
    file, source = (
        read_gguf(convert(tmp_path, Options(outtype="f32", skip_unknown=True))),
        language_tensors(spec),
    )
    assert file.kv["general.architecture"] == "qwen2"
    assert file.kv["qwen2.block_count"] == spec.n_layer
    assert not [key for key in file.kv if key.startswith("llama.")]
    assert "output.weight" not in file.tensors
    for part in "qkv":
        for end in ("weight", "bias"):
            np.testing.assert_array_equal(
                file.tensors[f"blk.1.attn_{part}.{end}"],
                source[f"model.layers.1.self_attn.{part}_proj.{end}"],
            )


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_hugging_face_llava_layout(tmp_path: Path, prefix: str) -> None:
    """llava-hf: settings in text_config (missing ones mean LlamaConfig's defaults), names behind another prefix."""
    write_llava_checkpoint(tmp_path, SPEC)
    head = "language_model.lm_head.weight" if prefix.startswith("language_model") else "lm_head.weight"
    tensors = {
        head if name == "lm_head.weight" else prefix + name.removeprefix("model."): array
        for name, array in language_tensors(SPEC).items()
    }
    write_shards(tmp_path, {**tensors, **projector_tensors(SPEC)}, "f32")
    config = json.loads((tmp_path / "config.json").read_text())
    text = {
        key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e4}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    file = read_gguf(convert(tmp_path, LLAVA))
    assert_file(file, SPEC, "f16")
    assert file.kv["llama.context_length"] == 2048
    assert file.kv["llama.rope.freq_base"] == 5e4
    assert file.kv["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_meta_layout(tmp_path: Path, script) -> None:
    """consolidated.00.pth and params.json: other names, q and k in GGUF's order already."""
    hf, ends = expected(SPEC), {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv"}
    ends |= {"attn_output": "attention.wo", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    ends |= {"ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}
    top = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
    tensors = {}
    for name, array in hf.items():
        parts = name.removesuffix(".weight").split(".")
        stem = top[parts[0]] if len(parts) == 1 else f"layers.{parts[1]}.{ends[parts[2]]}"
        tensors[stem + ".weight"] = array
    tensors["rope.freqs"] = np.ones(8, np.float32)
    write_shards(tmp_path, tensors, "f32", fmt="bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    write_tokenizer(tmp_path, SPEC)
    assert "--ctx" in failure(script("convert_legacy_llama", tmp_path))
    file = read_gguf(convert(tmp_path, Options(n_ctx=512)))
    assert_file(file, SPEC, "f16")
    assert file.kv["llama.context_length"] == 512
    (tmp_path / "consolidated.01.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="several slices"):
        convert(tmp_path, Options(n_ctx=512))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 62}, "does not divide by 4 heads"),
        ({"hidden_size": 32}, r"shape \[384, 64\], need \[384, 32\]"),
        ({"num_key_value_heads": 3}, "do not divide by 3"),
        ({"num_attention_heads": 64, "num_key_value_heads": 64}, "odd"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "Unexpected tensor"),
        ({"num_hidden_layers": 513}, r"1\.\.512"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": 0}, "above 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
        ({"max_position_embeddings": ...}, "--ctx"),
        ({"model_type": "qwen3", "architectures": ["LlavaQwen3ForCausalLM"]}, "only the LLaMA family"),
        ({"model_type": "qwen2", "architectures": ["LlavaQwenForCausalLM"]}, r"q_proj\.bias' is missing"),
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "only the LLaMA family"),
        ({"model_type": "gpt2", "architectures": []}, "only the LLaMA family"),
        ({"num_local_experts": 8}, "experts"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_llava_checkpoint(tmp_path, SPEC, projector=False)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=text):
        convert(tmp_path, Options())
    assert not list(tmp_path.glob("*.gguf*"))


def test_rope_scaling_and_context(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    change_config(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}, max_sequence_length=2048)
    kv = read_gguf(convert(tmp_path, LLAVA)).kv
    assert kv["llama.rope.scaling.type"] == "linear"
    assert kv["llama.rope.scaling.factor"] == 4.0
    assert kv["llama.context_length"] == 2048
    kv = read_gguf(convert(tmp_path, Options(skip_unknown=True, n_ctx=777))).kv
    assert kv["llama.context_length"] == 777


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_llama3_positions(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Llama 3.1's own numbers, with heads of 128: a tensor, and no key about it, as llama.cpp has it."""
    spec = TinySpec(n_embd=256, n_head=2, n_head_kv=1)
    write_llava_checkpoint(tmp_path, spec)
    change_config(tmp_path, rope_theta=None)
    change_config(tmp_path, **changes)
    file = read_gguf(convert(tmp_path, Options(outtype="q8_0", skip_unknown=True)))
    factors = file.tensors["rope_freqs.weight"]
    between = [1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327]
    np.testing.assert_allclose(factors, [1.0] * 29 + between + [8.0] * 29, rtol=1e-6)
    assert file.kinds["rope_freqs.weight"] == "F32"
    assert not [key for key in file.kv if "scaling" in key]


def test_llama3_positions_refused(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    for change, text in (
        ({"factor": None}, "factor is missing"),
        ({"low_freq_factor": 4}, "low_freq_factor 4 is not below high_freq_factor 4"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
    ):
        change_config(tmp_path, rope_scaling={"type": "llama3", **LLAMA3, **change})
        with pytest.raises(CheckpointError, match=text):
            convert(tmp_path, LLAVA)


@pytest.mark.parametrize(
    ("model", "text", "has_output", "tied"),
    [
        (False, True, True, False),
        (True, False, True, False),
        (False, True, False, True),
        (None, True, False, True),
        (None, True, True, True),
        (True, None, False, True),
        (False, False, True, False),
    ],
)
def test_ties_of_a_nested_model(
    tmp_path: Path, model: bool | None, text: bool | None, has_output: bool, tied: bool
) -> None:
    """Where model and language model disagree, the output that is there, or is not, decides."""
    write_llava_checkpoint(tmp_path, TinySpec(tied=not has_output))
    table = json.loads((tmp_path / "config.json").read_text())
    table.pop("tie_word_embeddings")
    nested = {**table, "model_type": "llama", "architectures": None, "tie_word_embeddings": text}
    outer = {"model_type": "llava", "text_config": nested, "tie_word_embeddings": model}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert ("output.weight" not in read_gguf(convert(tmp_path, LLAVA)).tensors) == tied


def test_head_dim_of_its_own(tmp_path: Path) -> None:
    """Mistral-Nemo style: n_head * head_dim is not n_embd."""
    write_llava_checkpoint(tmp_path, SPEC)
    tensors = language_tensors(SPEC)
    rng = np.random.RandomState(1)
    for i in range(SPEC.n_layer):
        for part, shape in (("q", (4 * 8, 64)), ("k", (2 * 8, 64)), ("v", (2 * 8, 64)), ("o", (64, 4 * 8))):
            name = f"model.layers.{i}.self_attn.{part}_proj.weight"
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    write_shards(tmp_path, tensors, "f32")
    change_config(tmp_path, head_dim=8)
    file = read_gguf(convert(tmp_path, LLAVA))
    assert file.kv["llama.rope.dimension_count"] == file.kv["llama.attention.key_length"] == 8
    np.testing.assert_array_equal(
        file.tensors["blk.0.attn_q.weight"],
        permuted(tensors["model.layers.0.self_attn.q_proj.weight"], 4).astype(np.float16),
    )


def test_flags(tmp_path: Path, script) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    run = ("convert_legacy_llama", folder, "--skip-unknown")
    out = tmp_path / "elsewhere.gguf"
    result = script(
        *run, "--outtype", "q8_0", "--outfile", out, "--model-name", "my model", "--ctx", "99", "--verbose"
    )
    assert result.stdout == f"{out}\n"
    assert "blk.1.ffn_norm.weight" in result.stderr
    file = read_gguf(out)
    assert file.kv["general.name"] == "my model"
    assert file.kv["llama.context_length"] == 99
    assert script(*run, "--get-outfile", "--outtype", "bf16").stdout == f"{folder / 'ggml-model-bf16.gguf'}\n"
    assert not list(folder.glob("*.gguf"))
    lines = script(*run, "--dump").stdout.splitlines()
    assert len(lines) == 25
    assert any(line.split()[:2] == ["lm_head.weight", "f32"] for line in lines)
    assert not list(folder.glob("*.gguf"))
    for wrong in (
        ["--ctx", "0"],
        ["--ctx", "x"],
        ["--outtype", "q4_0"],
        ["--concurrency", "4"],
        ["--big-endian"],
    ):
        failure(script(*run, *wrong), code=2)
    assert "'bpe' is not supported" in failure(script(*run, "--vocab-type", "bpe"), code=2)
    assert "no such folder" in failure(script(*run, "--outfile", tmp_path / "nowhere" / "x.gguf"))


def test_one_file_or_shard_as_model(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC, shards=3)
    out = tmp_path / "out.gguf"
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        convert(tmp_path / name, Options(outfile=out, skip_unknown=True))
        assert_file(read_gguf(out), SPEC, "f16")


def test_output_is_never_an_input(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "model.safetensors")
    for target in (tmp_path / "model.safetensors", tmp_path / "link.gguf"):
        with pytest.raises(Exception, match="both input and output"):
            convert(tmp_path, Options(outfile=target, skip_unknown=True))
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"), [(np.nan, "NaN or infinity"), (-np.inf, "NaN or infinity"), (7e4, "does not fit f16")]
)
def test_numbers_that_cannot_be_kept(tmp_path: Path, value: float, text: str) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    tensors = language_tensors(SPEC)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    write_shards(tmp_path, tensors, "f32")
    with pytest.raises(CheckpointError, match=text):
        convert(tmp_path, LLAVA)
    assert not list(tmp_path.glob("*.gguf*"))
    if value == 7e4:
        convert(tmp_path, Options(outtype="bf16", skip_unknown=True))


def test_dtypes_of_the_pair_agree_with_numpy() -> None:
    """bf16 rounding against the tests' own; f16 and q8_0 stay within the stated bounds on difficult rows."""
    rng = np.random.RandomState(2)
    rows = np.stack([rng.standard_normal(64) * 10.0**e for e in (-9, -6, -3, 0, 3)] + [np.zeros(64)]).astype(
        np.float32
    )
    rows[0, 0], rows[3, 5] = 0.0, 40.0
    np.testing.assert_array_equal(encode(rows, BF16), bf16_bits(rows))
    for kind in (F32, F16, BF16, Q8_0):
        got = decode(encode(rows, kind).tobytes(), len(rows), kind)
        assert (np.abs(got - rows) <= tolerance(rows, kind)).all(), kind.name
