"""Published layouts that hold the same model in other pieces: Phi-3's fused matrices, the folders of xtuner."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_gguf
from layouts import write_hf
from test_convert_vocabulary import fast_tokenizer
from tiny import (
    Arrays,
    TinySpec,
    language_config,
    language_tensors,
    projector_tensors,
    tokenizer_model,
    vision_tensors,
    write_clip_folder,
    write_llava_checkpoint,
    write_safetensors,
    write_shards,
    write_tokenizer,
)

from pyllava.convert.errors import CheckpointError
from pyllava.convert.llama_params import read_llama_params
from pyllava.convert.llava_model import Model, Options, convert

SPEC = TinySpec()
PLAIN = Options(outtype="f32", mmproj_outtype="f32", name="m", check=False)
MISTRAL = replace(PLAIN, template="mistral_instruct")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def edit(path: Path, **changes: Any) -> None:
    """Keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(ours: Model, theirs: Model) -> None:
    """To the byte."""
    assert ours.model.read_bytes() == theirs.model.read_bytes()
    assert ours.mmproj.read_bytes() == theirs.mmproj.read_bytes()


# Phi-3


def write_phi3(folder: Path, **changes: Any) -> Path:
    """A checkpoint of `write_hf` with q, k and v in one matrix, and the gate with what it gates."""
    from safetensors.numpy import load_file, save_file

    write_hf(folder, SPEC)
    tensors = load_file(folder / "model.safetensors")
    for i in range(SPEC.n_layer):
        start = f"language_model.model.layers.{i}."
        for end, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            names = [f"{start}{end.split('.')[0]}.{part}_proj.weight" for part in parts]
            tensors[f"{start}{end}.weight"] = np.concatenate([tensors.pop(name) for name in names])
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "model_type": "phi3", **changes})
    return folder


def test_phi3_becomes_a_llama(tmp_path: Path) -> None:
    """The same files as those of the checkpoint whose matrices are apart."""
    apart = convert(write_hf(tmp_path / "apart", SPEC), tmp_path / "a", PLAIN)
    assert_same(convert(write_phi3(tmp_path / "fused"), tmp_path / "b", PLAIN), apart)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "positions scaled by 'longrope', only linear, yarn and llama3 are supported",
        ),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 8}}, "positions scaled by 'su'"),
        ({"partial_rotary_factor": 0.75}, "positions turn 0.75 of a head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "positions turn 0.5 of a head"),
        (
            {"num_key_value_heads": 4},
            r"layers\.0\.self_attn\.qkv_proj\.weight.: 128 rows, need 64 \+ 64 \+ 64",
        ),
    ],
)
def test_phi3_that_is_no_llama(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        convert(write_phi3(tmp_path / "m", **changes), tmp_path / "out", PLAIN)


PHI3_TOKENS = {"<|assistant|>": True, "<|end|>": True, "<|user|>": True, "<|endoftext|>": False}
PROMPTS = (
    "<|user|>\n the cat<|end|>\n<|assistant|>\n",
    "<|user|>the cat \n\n<|end|> \t dog<|endoftext|> dog<|endoftext|>\n",
)


def phi3_tokenizer() -> dict[str, Any]:
    """`tokenizer.json` of a SentencePiece vocabulary with Phi-3's marks, all but one of which swallow white space."""
    table = fast_tokenizer(tokenizer_model(SPEC.n_vocab))
    plain = {"special": True, "single_word": False, "lstrip": False, "normalized": False}
    table["added_tokens"] += [
        {"id": SPEC.n_vocab + i, "content": text, "rstrip": rstrip, **plain}
        for i, (text, rstrip) in enumerate(PHI3_TOKENS.items())
    ]
    return table


@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer.model"])
def test_tokens_that_swallow_white_space(tmp_path: Path, source: str) -> None:
    """In a SentencePiece vocabulary, from either file; the ids are those of the `tokenizers` package."""
    pyllava = pytest.importorskip("pyllava")
    tokenizers = pytest.importorskip("tokenizers")
    folder, table = write_hf(tmp_path / "llava-phi-3-mini", SPEC), phi3_tokenizer()
    if source == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(table))
    else:
        decoder = {str(entry["id"]): entry for entry in table["added_tokens"]}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    with_rows(folder, SPEC.n_vocab + len(PHI3_TOKENS))
    made = convert(folder, tmp_path / "out", Options(check=False))
    assert made.template == "phi_3"
    assert read_gguf(made.model).kv["pyllava.tokens_rstrip"] == [384, 385, 386]
    judge = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **table}))
    with pyllava.Llava(made.model, made.mmproj) as llava:
        for text in PROMPTS:
            assert list(llava._model.tokenize(text)) == judge.encode(text).ids, text


def with_rows(folder: Path, n_vocab: int) -> None:
    """Rows of zeros for more tokens."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = np.concatenate([x, np.zeros((n_vocab - len(x), x.shape[1]), x.dtype)])
    save_file(tensors, folder / "model.safetensors")


# Mistral


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_llava_med(tmp_path: Path, place: str) -> None:
    """LLaVA-Med v1.5 is LLaVA-1.5 on Mistral: the same files but for its template, wherever its tower is."""
    write_clip_folder(tmp_path / "clip", SPEC)
    plain = convert(write_llava_checkpoint(tmp_path / "plain", SPEC), tmp_path / "a", MISTRAL)
    folder = write_llava_checkpoint(
        tmp_path / "llava-med-v1.5-mistral-7b", SPEC, tower=place == "inside", shards=4
    )
    names = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
    edit(folder / "config.json", sliding_window=None, tune_mm_mlp_adapter=False, **names)
    assert_same(convert(folder, tmp_path / "b", replace(MISTRAL, template=None)), plain)


def test_marks_around_a_picture_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some of the first LLaVA have them."""
    write_clip_folder(tmp_path / "clip", SPEC)
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    for said in (False, True):
        caplog.clear()
        edit(folder / "config.json", mm_use_im_start_end=said)
        convert(folder, tmp_path / "out", PLAIN)
        assert ("with <im_start> and <im_end> around a picture" in caplog.text) == said


# xtuner

RANK, ALPHA = 4, 3
BASE = "clip-tiny"


def factors() -> Arrays:
    """A LoRA adapter of the tower, by peft's names."""
    random, d, f = np.random.RandomState(5), SPEC.v_embd, SPEC.v_ff
    shapes = {"self_attn.k_proj": (d, d), "self_attn.q_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    found = {}
    for i in range(SPEC.v_layer):
        for name, (n_out, n_in) in shapes.items():
            start = f"base_model.model.vision_model.encoder.layers.{i}.{name}"
            found[f"{start}.lora_A.weight"] = random.standard_normal((RANK, n_in)).astype(np.float32)
            found[f"{start}.lora_B.weight"] = random.standard_normal((n_out, RANK)).astype(np.float32)
    return found


def merged_tower() -> Arrays:
    tower, pairs = vision_tensors(SPEC), factors()
    for name in [name for name in pairs if "lora_A" in name]:
        change = pairs[name.replace("lora_A", "lora_B")].astype(np.float64) @ pairs[name].astype(np.float64)
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        tower[target] = (tower[target] + ALPHA / RANK * change).astype(np.float32)
    return tower


def write_xtuner(folder: Path, tower: str) -> Path:
    """The language model at the root; `tower`: what was trained of the tower, "adapter" or "all"."""
    folder.mkdir(parents=True)
    write_shards(folder, language_tensors(SPEC), "f32", shards=2)
    config = language_config(SPEC) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, SPEC)
    projector = {
        name.replace("model.mm_projector", "model"): x for name, x in projector_tensors(SPEC).items()
    }
    (folder / "projector").mkdir()
    write_safetensors(folder / "projector" / "model.safetensors", projector, "f32")
    settings = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True}
    (folder / "projector" / "config.json").write_text(json.dumps(settings))
    if tower == "all":
        write_clip_folder(folder / "visual_encoder", SPEC, layout="vision")
        write_shards(folder / "visual_encoder", merged_tower(), "f32")
        return folder
    adapter = folder / "visual_encoder_adapter"
    adapter.mkdir()
    write_safetensors(adapter / "adapter_model.safetensors", factors(), "f32")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": f"openai/{BASE}", "modules_to_save": None})
    )
    return folder


@pytest.mark.parametrize("tower", ["adapter", "all"])
def test_xtuner(tmp_path: Path, tower: str) -> None:
    """The same files as those of the original layout with the tower inside; of an adapter the base lies beside it."""
    write_clip_folder(tmp_path / BASE, SPEC)
    original = write_llava_checkpoint(tmp_path / "original", SPEC)
    inside = {"model.vision_tower.vision_tower." + name: x for name, x in merged_tower().items()}
    write_shards(original, {**language_tensors(SPEC), **projector_tensors(SPEC), **inside}, "f32")
    edit(original / "config.json", mm_vision_tower=f"openai/{BASE}")
    wanted = convert(original, tmp_path / "a", PLAIN)
    assert_same(convert(write_xtuner(tmp_path / "xtuner", tower), tmp_path / "b", PLAIN), wanted)


def test_phi3_of_xtuner(tmp_path: Path) -> None:
    """Fused at the root, with all of the tower."""
    folder = write_xtuner(tmp_path / "split", "all")
    wanted = convert(folder, tmp_path / "a", PLAIN)
    fused = load_all(write_phi3(tmp_path / "phi3"))
    language = {
        name.removeprefix("language_model."): x for name, x in fused.items() if "language_model" in name
    }
    write_shards(folder, language, "f32", shards=2)
    edit(folder / "config.json", model_type="phi3", architectures=["Phi3ForCausalLM"])
    assert_same(convert(folder, tmp_path / "b", PLAIN), wanted)


def load_all(folder: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def refused(folder: Path, text: str, options: Options = PLAIN) -> None:
    out = folder.parent / "out"
    with pytest.raises(CheckpointError, match=text):
        convert(folder, out, options)
    assert not out.exists() or not list(out.iterdir())


def test_xtuner_without_a_part(tmp_path: Path) -> None:
    """The base tower, another one, the adapter's factors, the tower altogether, the language model."""
    folder = write_xtuner(tmp_path / "m", "adapter")
    adapter, config = (
        folder / "visual_encoder_adapter",
        folder / "visual_encoder_adapter" / "adapter_config.json",
    )
    refused(
        folder,
        f"trained with 'openai/{BASE}': get that model .* into {tmp_path / BASE}, or .* --vision-tower",
    )
    tower = write_clip_folder(tmp_path / "other", TinySpec(v_embd=64))
    refused(folder, r"of shape \[64, 64\] with factors of", Options(vision_tower=tower, check=False))
    write_clip_folder(tmp_path / BASE, SPEC)
    edit(config, use_dora=True)
    refused(folder, "adapter_config.json: use_dora is True, which is not supported")
    edit(config, use_dora=False, bias="all")
    refused(folder, "bias is 'all', need 'none'")
    edit(config, bias="none", r=0)
    refused(folder, "r is 0, need an integer")
    edit(config, r=RANK)
    for changed, text in (
        ("base_model.model.vision_model.post.lora_A.weight", "is of no tensor of the vision tower"),
        ("base_model.model.vision_model.encoder.layers.0.mlp.fc1.bias", "need lora_A and lora_B alone"),
    ):
        extra = {**factors(), changed: np.ones((RANK, 8), np.float32)}
        write_safetensors(adapter / "adapter_model.safetensors", extra, "f32")
        refused(folder, text)
    half = {name: x for name, x in factors().items() if "layers.0.mlp.fc1.lora_B" not in name}
    write_safetensors(adapter / "adapter_model.safetensors", half, "f32")
    refused(folder, "with factors")
    (adapter / "adapter_model.safetensors").unlink()
    refused(folder, "no adapter_model.safetensors")
    config.unlink()
    adapter.rmdir()
    refused(folder, "no vision tower in the checkpoint.*give its folder with --vision-tower")
    language = folder / "llm_adapter"
    language.mkdir()
    (language / "adapter_model.safetensors").touch()
    (language / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3"}')
    refused(folder, "a LoRA adapter of 'meta-llama/Llama-3'")  # even with its base at the root
    (folder / "config.json").unlink()
    refused(folder, "a LoRA adapter of 'meta-llama/Llama-3'")


# Refused by name


@pytest.mark.parametrize(
    ("kind", "architecture", "text"),
    [
        ("bunny-phi", "BunnyPhiForCausalLM", "'bunny-phi', Phi-2, is not supported: its layers compute"),
        ("imp", "ImpForCausalLM", "'imp', Phi-2"),
        (
            "llava",
            "LlavaStablelmForCausalLM",
            "'LlavaStablelmForCausalLM', StableLM, is not supported: it has layer",
        ),
        ("llava_gemma", "LlavaGemmaForCausalLM", "'llava_gemma', Gemma, is not supported"),
        ("llava_mpt", "LlavaMptForCausalLM", "'llava_mpt', MPT, is not supported"),
        (
            "llava_qwen2",
            "LlavaQwen2ForCausalLM",
            "'llava_qwen2', FastVLM, is not supported: its vision tower",
        ),
        (
            "llavaonevision1_5",
            "LLaVAOneVision1_5_ForConditionalGeneration",
            "'llavaonevision1_5', LLaVA-OneVision 1.5",
        ),
        ("granite4_vision", "Granite4VisionForConditionalGeneration", "'granite4_vision', Granite 4 Vision"),
    ],
)
def test_refused_by_name(tmp_path: Path, kind: str, architecture: str, text: str) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    edit(folder / "config.json", model_type=kind, architectures=[architecture])
    refused(folder, text)


@pytest.mark.parametrize(("kind", "name"), [("phi", "Phi-2"), ("stablelm", "StableLM"), ("gemma2", "Gemma")])
def test_language_model_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    """Nested as transformers does, and on its own."""
    folder = write_hf(tmp_path / "m", SPEC)
    edit(folder / "config.json", text_config={**language_config(SPEC), "model_type": kind})
    refused(folder, f"'{kind}', {name}, is not supported")
    (folder / "config.json").write_text(json.dumps(language_config(SPEC) | {"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"'{kind}', {name}, is not supported"):
        read_llama_params(folder, {}, None)


def quantised(folder: Path) -> Path:
    """With one matrix as GPTQ and AWQ store it."""
    name = "model.layers.0.mlp.up_proj.qweight"
    write_safetensors(
        folder / "model.safetensors", language_tensors(SPEC) | {name: np.ones((8, 8), np.float32)}, "f32"
    )
    for shard in folder.glob("model-*"):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    return folder


@pytest.mark.parametrize("layout", ["original", "xtuner"])
def test_quantised_weights(tmp_path: Path, layout: str) -> None:
    if layout == "original":
        folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    else:
        folder = write_xtuner(tmp_path / "m", "all")
    refused(quantised(folder), r"quantised weights \(awq; .*up_proj.qweight.*in 16 or 32 bits")
