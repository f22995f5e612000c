"""convert_llava: both published layouts of LLaVA-1.5 and 1.6 in one step, what it refuses, and what it leaves
behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, Gguf, failure, read_gguf
from layouts import newline, pinpoints, write_16, write_hf, write_tower_config
from test_convert_legacy_llama import assert_file
from test_convert_scripts import STRANGE
from test_convert_vocabulary import fast_tokenizer, texts
from tiny import (
    TinySpec,
    language_config,
    language_tensors,
    projector_tensors,
    sentences,
    vision_config,
    write_clip_folder,
    write_llava_checkpoint,
    write_shards,
)

from pyllava import quantize, templates
from pyllava.cli.convert import convert as convert_command
from pyllava.convert import llava_model
from pyllava.convert.chat_template import NAMES, jinja
from pyllava.convert.convert_llava import command, main
from pyllava.convert.encoding import agrees, decode, encode
from pyllava.convert.errors import CheckpointError, ConvertError, OutputError
from pyllava.convert.families import CLIP, QWEN2, SIGLIP
from pyllava.convert.language_model import Options as LanguageOptions
from pyllava.convert.language_model import convert as convert_language
from pyllava.convert.llama_params import read_llama_params
from pyllava.convert.llava_config import LLAVA_TOWER, nested_tower
from pyllava.convert.llava_model import Model, Options, convert, model_name
from pyllava.convert.llava_surgery_v2 import main as surgery_main
from pyllava.convert.mixes import MIX_NAMES, OUT_TYPES
from pyllava.convert.projector_file import convert as convert_tower
from pyllava.convert.surgery import split_off
from pyllava.convert.vision_params import llava_facts, vision_params
from pyllava.convert.vit_config import read_llava_config, write_vit_config
from pyllava.formats import FORMATS

SPEC = TinySpec(dtype="bf16")
PLAIN = Options(outtype="f32", mmproj_outtype="f32", check=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def original_15(folder: Path, spec: TinySpec = SPEC) -> Path:
    write_clip_folder(folder.parent / "clip", spec)
    return write_llava_checkpoint(folder, spec, shards=2)


def original_16(folder: Path, spec: TinySpec = SPEC) -> Path:
    write_tower_config(folder.parent / "clip-tiny", spec)
    return write_16(folder, spec, fmt="bin", shards=2)


def files(model: Model) -> tuple[Gguf, Gguf]:
    return read_gguf(model.model), read_gguf(model.mmproj)


def assert_same_tensors(ours: Gguf, theirs: Gguf) -> None:
    assert set(ours.tensors) == set(theirs.tensors)
    assert ours.kinds == theirs.kinds
    for name, array in theirs.tensors.items():
        np.testing.assert_array_equal(ours.tensors[name], array, name)


def assert_same_keys(ours: Gguf, theirs: Gguf, *but: str) -> None:
    different = {k for k in ours.kv.keys() | theirs.kv.keys() if ours.kv.get(k) != theirs.kv.get(k)}
    assert different <= {"general.name", *but}


# The layouts


def test_the_same_as_step_by_step(tmp_path: Path) -> None:
    """LLaVA-1.5: the tensors and keys of the three scripts, plus the template's name and text."""
    folder = original_15(tmp_path / "llava-v1.5-tiny")
    language, mmproj = files(convert(folder, tmp_path / "out", Options(check=False)))
    split_off(folder, folder)
    tower = read_gguf(convert_tower(tmp_path / "clip", folder / "llava.projector", tmp_path))
    assert_same_tensors(mmproj, tower)
    assert_same_keys(mmproj, tower)
    steps = read_gguf(convert_language(folder, LanguageOptions(skip_unknown=True)))
    assert_same_tensors(language, steps)
    assert_same_keys(language, steps, "pyllava.template", "tokenizer.chat_template")
    assert language.kv["pyllava.template"] == "vicuna_v1"


@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
@pytest.mark.parametrize("newer", [False, True], ids=["old-names", "new-names"])
@pytest.mark.parametrize("shards", [1, 3])
def test_both_layouts_give_the_same(tmp_path: Path, tiles: bool, newer: bool, shards: int) -> None:
    make = original_16 if tiles else original_15
    first = convert(make(tmp_path / "original"), tmp_path / "out", PLAIN)
    folder = write_hf(tmp_path / "hf", SPEC, tiles=tiles, newer=newer, shards=shards)
    second = convert(folder, tmp_path / "out", PLAIN)
    for ours, theirs in zip(files(second), files(first), strict=True):
        assert_same_tensors(ours, theirs)
        resolutions = ("clip.vision.image_crop_resolution", "clip.vision.image_split_resolution")
        assert_same_keys(ours, theirs, *resolutions)  # llava-hf does not tell them, and no reader asks
    assert_file(files(first)[0], SPEC, "f32")


def test_llava_16(tmp_path: Path) -> None:
    model = convert(original_16(tmp_path / "llava-v1.6-34b"), tmp_path / "out", Options(check=False))
    language, mmproj = files(model)
    assert model.model == tmp_path / "out" / "llava-v1.6-34b-f16.gguf"
    assert model.mmproj == tmp_path / "out" / "mmproj-llava-v1.6-34b-f16.gguf"
    assert language.kv["pyllava.template"] == "chatml_direct"
    assert mmproj.kv["clip.vision.image_grid_pinpoints"] == [n for pair in pinpoints(SPEC) for n in pair]
    assert mmproj.kv["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    np.testing.assert_array_equal(mmproj.tensors["model.image_newline"], newline(SPEC))


@pytest.mark.parametrize("layout", ["original", "hugging-face"])
def test_llava_16_the_same_as_step_by_step(tmp_path: Path, layout: str) -> None:
    if layout == "original":
        folder = original_16(tmp_path / "m")
    else:
        folder = write_hf(tmp_path / "m", SPEC, tiles=True)
    mmproj = files(convert(folder, tmp_path / "out", Options(check=False)))[1]
    assert surgery_main(["-C", "-m", str(folder)]) == 0
    write_vit_config(folder, tmp_path / "vit")
    (folder / "llava.clip").rename(tmp_path / "vit" / "pytorch_model.bin")
    for place in (folder, tmp_path / "vit"):  # beside either config.json
        moved = (folder / "llava.projector").rename(place / "llava.projector")
        steps = read_gguf(convert_tower(tmp_path / "vit", moved, tmp_path, layout="vision"))
        assert_same_tensors(mmproj, steps)
        assert_same_keys(mmproj, steps)


def test_bakllava(tmp_path: Path) -> None:
    """Mistral's shape, its own tower, padded pictures, Vicuna's template."""
    spec = TinySpec(n_head=4, n_head_kv=1, dtype="bf16")
    folder = write_llava_checkpoint(
        tmp_path / "BakLLaVA-1", spec, tower=True, added={"<pad>": 384, "<image>": 385}
    )
    edit(folder, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"])
    write_tower_config(folder / "clip", spec)
    language, mmproj = files(convert(folder, tmp_path / "out", PLAIN))
    assert_file(language, spec, "f32")
    assert language.kv["pyllava.template"] == "vicuna_v1"
    assert len(language.kv["tokenizer.ggml.tokens"]) == 384
    assert mmproj.kv["clip.vision.image_aspect_ratio"] == "pad"


def edit(folder: Path, **changes: Any) -> None:
    table = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    (folder / "config.json").write_text(json.dumps(table))


def test_pinpoints_of_transformers_are_heights_first(tmp_path: Path) -> None:
    """A list that holds no pair both ways is turned; the published one, which does, keeps its order."""
    s = SPEC.image_size
    folder = write_hf(tmp_path / "m", SPEC, tiles=True, more={"image_grid_pinpoints": [[s, 3 * s], [s, s]]})
    mmproj = files(convert(folder, tmp_path / "out", PLAIN))[1]
    assert mmproj.kv["clip.vision.image_grid_pinpoints"] == [3 * s, s, s, s]


@pytest.mark.reference
def test_defaults_of_nested_configs(tmp_path: Path) -> None:
    """Keys that published configs leave out, as the classes of the parts, LlavaConfig and LlavaOnevisionConfig fill
    them.
    """
    transformers = pytest.importorskip("transformers")
    names = ("LlamaConfig", "MistralConfig", "Qwen2Config", "GraniteConfig", "Phi3Config")
    for theirs in (getattr(transformers, name)() for name in names):
        kind = theirs.model_type
        config = {"model_type": "llava", "text_config": {"model_type": kind}, "vision_config": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        ours, _ = read_llama_params(tmp_path, {}, None)
        assert (ours.n_embd, ours.n_layer, ours.n_head, ours.n_ff) == (
            *(theirs.hidden_size, theirs.num_hidden_layers),
            *(theirs.num_attention_heads, theirs.intermediate_size),
        )
        assert (ours.n_head_kv, ours.n_ctx) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
        assert (ours.eps, ours.n_vocab) == (theirs.rms_norm_eps, theirs.vocab_size)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.scales == {key: getattr(theirs, name) for key, name in ours.family.scales.items()}
    vision = transformers.LlavaConfig().vision_config
    for key, value in CLIP.published[LLAVA_TOWER].items():
        assert getattr(vision, key) == value, key
    for key, value in CLIP.defaults.items():
        assert getattr(transformers.CLIPVisionConfig(), key) == value, key
    for key, value in SIGLIP.defaults.items():
        assert key == "projection_dim" or getattr(transformers.SiglipVisionConfig(), key) == value, key
    theirs = transformers.LlavaOnevisionConfig()
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"}
        )
    )
    config, settings = read_llava_config(tmp_path)
    params = vision_params(nested_tower(config), {})
    for key, name in (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("image_size",) * 2):
        assert getattr(theirs.vision_config, key) == getattr(params, name), key
    facts = llava_facts(settings, params)
    assert list(facts.pinpoints) == [side for pair in theirs.image_grid_pinpoints for side in pair]
    assert (facts.aspect_ratio, facts.feature_layers) == (theirs.vision_aspect_ratio, (26,))
    assert read_llama_params(tmp_path, {}, None)[0].family is QWEN2


@pytest.mark.reference
@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
def test_saved_by_transformers(tmp_path: Path, tiles: bool) -> None:
    """A model made and saved by transformers, whichever names and keys its version writes."""
    transformers = pytest.importorskip("transformers")
    spec = TinySpec(rope_theta=50000.0)
    parts = {
        "vision_config": transformers.CLIPVisionConfig(**vision_config(spec)),
        "text_config": transformers.LlamaConfig(
            **{k: v for k, v in language_config(spec).items() if k not in ("model_type", "rope_theta")},
            rope_parameters={"rope_theta": spec.rope_theta, "rope_type": "default"},
        ),
        "image_token_index": 5,
    }
    if tiles:
        config = transformers.LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints(spec))
        model = transformers.LlavaNextForConditionalGeneration(config)
    else:
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts))
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    write_hf(tmp_path / "other", spec)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "other" / name).rename(tmp_path / "m" / name)
    language, mmproj = files(convert(tmp_path / "m", tmp_path / "out", PLAIN))
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    ends = {
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "v.blk.1.ffn_up.weight": "encoder.layers.1.mlp.fc2.weight",
        "blk.1.ffn_down.weight": "layers.1.mlp.down_proj.weight",
        "output.weight": "lm_head.weight",
    }
    if tiles:
        ends["model.image_newline"] = "image_newline"
    for name, end in ends.items():
        (source,) = [value for key, value in state.items() if key.endswith(end)]
        found = language.tensors.get(name, mmproj.tensors.get(name))
        assert found is not None
        np.testing.assert_array_equal(found, source)
    assert language.kv["llama.rope.freq_base"] == pytest.approx(spec.rope_theta)


# The vocabulary


@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
def test_rows_rounded_up_to_64(tmp_path: Path, tiles: bool) -> None:
    """386 tokens in 448 rows: every row is kept, those without a token get one that no text is read as."""
    folder = write_hf(tmp_path / "m", SPEC, tiles=tiles, padded=True)
    language, _ = files(convert(folder, tmp_path / "out", PLAIN))
    tokens = language.kv["tokenizer.ggml.tokens"]
    assert language.kv["llama.vocab_size"] == len(tokens) == 448
    assert tokens[384:388] == ["<image>", "<pad>", "<dummy00001>", "<dummy00002>"]
    assert language.kv["tokenizer.ggml.token_type"][384:] == [3, 3] + [5] * 62
    assert language.kv["tokenizer.ggml.padding_token_id"] == 385
    for name, source in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(language.tensors[name][:384], language_tensors(SPEC)[source])
        assert (language.tensors[name][384:] == 0.25).all()


def test_real_rows_give_the_same_logits(tmp_path: Path) -> None:
    pyllava = pytest.importorskip("pyllava")
    plain = Options(outtype="f32", mmproj_outtype="f32")
    first = convert(original_15(tmp_path / "m"), tmp_path / "a", plain)
    second = convert(write_hf(tmp_path / "hf", SPEC, padded=True), tmp_path / "b", plain)
    logits = []
    for model in (first, second):
        with pyllava.Llava(model.model, model.mmproj, precision="exact") as opened:
            logits.append(opened.logits(ROOT / "examples" / "scene.png", "What is <image> this?"))
    assert logits[0].shape[1] == 384
    assert logits[1].shape[1] == 448
    np.testing.assert_array_equal(logits[1][:, :384], logits[0])


def test_other_missing_tokens_are_an_error(tmp_path: Path) -> None:
    """Rows that rounding does not explain: wrong or incomplete tokenizer, unless the user says otherwise."""
    folder = write_hf(tmp_path / "m", SPEC, padded=True)
    (folder / "added_tokens.json").unlink()
    edit_tokenizer(folder, added_tokens_decoder={}, pad_token="<unk>")
    with pytest.raises(CheckpointError, match=r"model has 448, but .* has 384.*--pad-vocab"):
        convert(folder, tmp_path / "out", PLAIN)
    language, _ = files(convert(folder, tmp_path / "out", Options(pad_vocab=True, check=False)))
    assert len(language.kv["tokenizer.ggml.tokens"]) == 448


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    table = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, **changes}))


def test_yi(tmp_path: Path) -> None:
    """The 34B model: `<|im_start|>` and `<|im_end|>` are pieces of their own, and the second ends an
    answer.
    """
    folder = original_16(tmp_path / "llava-v1.6-34b")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=str(folder / "tokenizer"), vocab_size=384,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=["<fim_prefix>", "<|im_start|>", "<|im_end|>"],
        bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", num_threads=1, minloglevel=2,
    )  # fmt: skip
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False}
    edit_tokenizer(folder, **ends)
    edit(folder, eos_token_id=5)
    language, _ = files(convert(folder, tmp_path / "out", Options()))
    assert language.kv["tokenizer.ggml.tokens"][3:6] == ["<fim_prefix>", "<|im_start|>", "<|im_end|>"]
    assert language.kv["tokenizer.ggml.token_type"][3:6] == [4, 3, 3]
    assert language.kv["tokenizer.ggml.eos_token_id"] == 2
    assert language.kv["tokenizer.ggml.eot_token_id"] == 5
    assert language.kv["tokenizer.ggml.add_bos_token"] is False
    pyllava = pytest.importorskip("pyllava")
    with pyllava.Llava(*tmp_path.glob("out/llava*.gguf")) as opened:
        assert opened.template.name == "chatml_direct"
        ids = [token for token in opened.prompt_tokens(None, "Q") if isinstance(token, int)]
        assert (ids.count(4), ids.count(5)) == (3, 2)
        words = [token for token in opened.prompt_tokens(None, "<|im_end|>") if isinstance(token, int)]
        assert words.count(5) == 2  # a user's words are never read as one
    edit_tokenizer(folder, eos_token="<|im_end|>")
    language, _ = files(convert(folder, tmp_path / "out", PLAIN))
    assert language.kv["tokenizer.ggml.eos_token_id"] == 5
    assert "tokenizer.ggml.eot_token_id" not in language.kv


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    """Without tokenizer.model: the same pieces from tokenizer.json, and the same ids in pyllava."""
    pyllava = pytest.importorskip("pyllava")
    folder = write_hf(tmp_path / "m", SPEC, padded=True)
    first = convert(folder, tmp_path / "a", PLAIN)
    table = fast_tokenizer((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.model").unlink()
    table["added_tokens"] += [
        {"id": SPEC.n_vocab + i, "content": text, "special": True}
        for i, text in enumerate(("<image>", "<pad>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    second = convert(folder, tmp_path / "b", PLAIN)
    assert_same_keys(files(second)[0], files(first)[0], "tokenizer.ggml.scores")
    with pyllava.Llava(first.model) as spm, pyllava.Llava(second.model) as fast:
        for text in texts():
            assert list(fast.tokenize(text)) == list(spm.tokenize(text)), text
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": {}}}')
    refused(folder, tmp_path / "c", "neither byte-level BPE nor SentencePiece-style")


# Templates


def test_templates_in_jinja() -> None:
    """The Jinja text of each template renders a conversation as pyllava does."""
    jinja2 = pytest.importorskip("jinja2")
    later = [("assistant", " A <b>. "), ("user", "'And' \"so\"?")]
    shown = [templates.Message("user", "What?\n", images=1)]
    shown += [templates.Message(role, text) for role, text in later]
    for name in NAMES:
        known = templates.TEMPLATES[name]
        talk = [("user", f"{'<image>'.join(known.image_brackets)}{known.image_suffix}What?\n"), *later]
        for options in ({}, {"trim_blocks": True, "lstrip_blocks": True}):
            compiled = jinja2.Environment(**options).from_string(jinja(name))
            for system in (None, "", "Be brief."):
                start = [] if system is None else [{"role": "system", "content": system}]
                messages = start + [{"role": role, "content": text} for role, text in talk]
                wanted = templates.prompt_text(templates.render(known, shown, system=system))
                assert compiled.render(messages=messages, add_generation_prompt=True) == wanted
            parts = [{"type": "image"}, {"type": "text", "text": "What?\n"}]
            messages = [{"role": "user", "content": parts}, *messages[-2:]]
            wanted = templates.prompt_text(templates.render(known, shown))
            assert compiled.render(messages=messages, add_generation_prompt=True) == wanted


def test_template_of_the_checkpoint_and_of_the_user(tmp_path: Path) -> None:
    folder = original_15(tmp_path / "my-model")
    edit(folder, _name_or_path="./checkpoints/34b/mistral-llava")
    language, _ = files(convert(folder, tmp_path / "out", PLAIN))
    assert language.kv["pyllava.template"] == "mistral_instruct"
    assert language.kv["tokenizer.chat_template"] == jinja("mistral_instruct")
    edit_tokenizer(folder, chat_template="{{ own }}")
    own = Options(outtype="f32", template="llava_v0", name="other", check=False)
    model = convert(folder, tmp_path / "out", own)
    assert model.model.name == "other-f32.gguf"
    language, _ = files(model)
    assert language.kv["pyllava.template"] == "llava_v0"
    assert language.kv["tokenizer.chat_template"] == "{{ own }}"
    assert language.kv["general.name"] == "other"


# Types

WIDE = TinySpec(n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_layer=8, dtype="bf16")


QUICK = ("q4_0", "q5_1", "q2_k", "q4_k_m")


@pytest.mark.parametrize(
    "outtype",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in MIX_NAMES
        if name not in OUT_TYPES
    ],
)
def test_quantized(tmp_path: Path, outtype: str) -> None:
    folder = original_15(tmp_path / "m", WIDE)
    language, mmproj = files(convert(folder, tmp_path / "out", Options(outtype=outtype)))
    plan = quantize.Plan(outtype, n_layer=8, n_head=4, n_head_kv=2, tied=False)
    source = files(convert(folder, tmp_path / "plain", PLAIN))[0]
    for name, array in source.tensors.items():
        assert language.kinds[name] == plan.tensor_type(name, array.shape), name
        error = np.sqrt(((language.tensors[name] - array) ** 2).mean()) / np.sqrt((array**2).mean())
        assert error < 0.35, name
    assert language.kv["general.file_type"] == quantize.TYPES[outtype].file_type
    assert language.kv["general.quantization_version"] == 2
    assert set(mmproj.kinds.values()) == {"F16", "F32"}


def test_wrong_rows_of_a_quantised_tensor_are_noticed() -> None:
    random = np.random.RandomState(3)
    x = random.standard_normal((16, 512)).astype(np.float32) * np.exp(random.standard_normal((16, 1)))
    x = x.astype(np.float32)
    x[3] = 0
    for kind in FORMATS.values():
        got = decode(encode(x, kind).tobytes(), 16, kind)
        assert agrees(got, x, kind), kind.name
        for wrong in (got[::-1], got * 0, got * np.float32(3), -got, np.full_like(got, np.nan)):
            assert not agrees(wrong, x, kind), kind.name


def test_number_too_large_for_the_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = original_15(tmp_path / "m", WIDE)
    tensors = {**language_tensors(WIDE), **projector_tensors(WIDE)}
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = 1e30
    write_shards(folder, tensors, "bf16", shards=2)
    assert main([str(folder), "-o", str(tmp_path / "out"), "--outtype", "q4_k_m"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convert_llava: error: 'model.layers.2.mlp.up_proj.weight': ")
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_that_no_block_of_256_divides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = original_15(tmp_path / "m")
    assert main([str(folder), "--outtype", "q4_k_m", "-o", str(tmp_path / "out")]) == 0
    assert "16 matrices get another type than q4_k_m" in capsys.readouterr().err
    kinds = read_gguf(tmp_path / "out" / "m-q4_k_m.gguf").kinds
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_type_of_the_projector(tmp_path: Path, kind: str) -> None:
    model = convert(original_16(tmp_path / "m"), tmp_path, Options(mmproj_outtype=kind))
    assert model.mmproj == tmp_path / f"mmproj-m-{kind}.gguf"
    assert read_gguf(model.mmproj).kinds["mm.2.weight"] == kind.upper()


def test_without_the_library(tmp_path: Path, script) -> None:
    """Types of our own need no library; the others say that they do."""
    folder = original_15(tmp_path / "m")
    without = {**os.environ, "PYLLAVA_LIBRARY": str(tmp_path / "libpyllava.so")}
    result = script("convert_llava", folder, "--outtype", "q8_0", env=without)
    assert result.returncode == 0, result.stderr
    assert "not opened with pyllava itself" in result.stderr
    line = failure(script("convert_llava", folder, "--outtype", "q4_k_m", env=without))
    assert "--outtype q4_k_m needs the compiled library: libpyllava is not built" in line


# The tower


def test_vision_tower_of_the_command_line(tmp_path: Path) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    clip = write_clip_folder(tmp_path / "elsewhere" / "vit", SPEC, layout="vision")
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "out", PLAIN)
    assert "which was trained with 'clip'" in str(error.value)
    assert f"into {tmp_path / 'clip'}, or give its folder with --vision-tower" in str(error.value)
    assert not (tmp_path / "out").exists()
    files(convert(folder, tmp_path / "out", Options(vision_tower=clip, check=False)))


@pytest.mark.parametrize("place", ["m/clip-x", "clip-x", "m/openai/clip-x", "openai/clip-x"])
def test_where_a_tower_is_looked_for(tmp_path: Path, place: str) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    edit(folder, mm_vision_tower="openai/clip-x")
    write_tower_config(tmp_path / "m" / "clip-x", SPEC)  # a config alone is no tower
    write_clip_folder(tmp_path / place, SPEC)
    files(convert(folder, tmp_path / "out", PLAIN))


def test_config_names_no_tower(tmp_path: Path) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    edit(folder, mm_vision_tower=None)
    with pytest.raises(CheckpointError, match=r"names none \(mm_vision_tower\): give its folder"):
        convert(folder, tmp_path / "out", PLAIN)


def test_own_tower_wins(tmp_path: Path) -> None:
    """LLaVA-1.6 trained its tower: the published one beside it gives the settings alone."""
    folder = write_16(tmp_path / "m", SPEC)
    other = write_clip_folder(tmp_path / "clip-tiny", TinySpec(seed=9, dtype="bf16"))
    first = convert(folder, tmp_path / "a", PLAIN)
    second = convert(folder, tmp_path / "b", Options("f32", "f32", vision_tower=other, check=False))
    assert first.mmproj.read_bytes() == second.mmproj.read_bytes()
    hf = convert(write_hf(tmp_path / "hf", SPEC, tiles=True), tmp_path / "c", PLAIN)
    assert_same_tensors(read_gguf(hf.mmproj), read_gguf(first.mmproj))


def test_image_settings_of_either_place(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m", SPEC)
    pixels = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.5]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
    mmproj = read_gguf(convert(folder, tmp_path / "out", PLAIN).mmproj)
    assert mmproj.kv["clip.vision.image_mean"] == [0.5, 0.25, 0.125]


# What is refused


def refused(folder: Path, out: Path, text: str) -> None:
    with pytest.raises(ConvertError, match=text):
        convert(folder, out, PLAIN)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("without", "text"),
    [
        ("model.image_newline", r"no model\.image_newline, which a model with spatial_unpad needs"),
        (
            "image_grid_pinpoints",
            "image_grid_pinpoints are missing, which a model with 'spatial_unpad' needs",
        ),
        ("model.mm_projector.2.weight", "no projector of a known type"),
        ("model.mm_projector.0.bias", "'mm.0.bias' is missing"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
            "fc1.bias' is missing",
        ),
        ("model.layers.1.mlp.up_proj.weight", r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"),
    ],
)
def test_missing_parts(tmp_path: Path, without: str, text: str) -> None:
    write_tower_config(tmp_path / "clip-tiny", SPEC)
    refused(write_16(tmp_path / "m", SPEC, without=(without,)), tmp_path / "out", text)


def test_newline_without_resolutions(tmp_path: Path) -> None:
    without = ("image_grid_pinpoints", "mm_patch_merge_type")
    write_tower_config(tmp_path / "clip-tiny", SPEC)
    folder = write_16(tmp_path / "m", SPEC, without=without)
    refused(folder, tmp_path / "out", r"model\.image_newline is LLaVA-1\.6's, but no config\.json")


def test_projector_in_two_shards(tmp_path: Path) -> None:
    write_clip_folder(tmp_path / "clip", SPEC)
    folder = write_llava_checkpoint(
        tmp_path / "m", SPEC, shards=2, shard_of=lambda name: int("mm_projector.2" in name)
    )
    mmproj = read_gguf(convert(folder, tmp_path / "out", PLAIN).mmproj)
    np.testing.assert_array_equal(
        mmproj.tensors["mm.2.weight"], projector_tensors(SPEC)["model.mm_projector.2.weight"]
    )


def test_other_models(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = write_hf(tmp_path / "naflex", SPEC)
    edit(plain, vision_config={**vision_config(SPEC), "model_type": "siglip2_vision_model"})
    refused(plain, out, "a tower of type 'siglip2_vision_model', only CLIP's and SigLIP's")
    siglip = {**vision_config(SPEC), "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    plain = write_hf(tmp_path / "siglip", SPEC)
    edit(plain, vision_config=siglip)
    refused(plain, out, "features 'default' are selected, only 'full'")
    edit(plain, vision_config={**siglip, "hidden_act": "gelu"}, vision_feature_select_strategy="full")
    refused(plain, out, "hidden_act 'gelu', need one of gelu_pytorch_tanh")
    plain = write_hf(tmp_path / "class", SPEC)
    edit(plain, vision_feature_select_strategy="full")
    refused(plain, out, "features 'full' are selected, only 'patch'")
    plain = write_hf(tmp_path / "several", SPEC)
    edit(plain, vision_feature_layer=[-2, -3])
    refused(plain, out, r"the tower gives rows of 64; is this the right vision tower")
    plain = write_hf(tmp_path / "relu", SPEC)
    edit(plain, projector_hidden_act="relu")
    refused(plain, out, "projector_hidden_act is 'relu', need 'gelu'")
    plain = write_hf(tmp_path / "qwen", SPEC)
    edit(plain, text_config={"model_type": "qwen3"})
    refused(plain, out, "only the LLaMA family, Qwen2, Granite and Phi-3 are supported")
    plain = write_hf(tmp_path / "video", SPEC, tiles=True)
    edit(plain, model_type="llava_next_video")
    refused(plain, out, "a model of type 'llava_next_video', need one of llava, llava_next")
    plain = tmp_path / "llama"
    plain.mkdir()
    write_shards(plain, language_tensors(SPEC), "f32")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    refused(plain, out, "a model of type 'llama' without LLaVA's settings")


def test_projector_of_another_model(tmp_path: Path) -> None:
    folder = write_llava_checkpoint(tmp_path / "m", SPEC)
    write_clip_folder(tmp_path / "clip", SPEC)
    tensors = {**language_tensors(SPEC), **projector_tensors(TinySpec(n_embd=96, n_head=6, dtype="bf16"))}
    write_shards(folder, tensors, "bf16")
    refused(folder, tmp_path / "out", "the projector gives rows of 96, the language model takes 64")


def test_usage(tmp_path: Path, script) -> None:
    assert "'q9', need one of f32, f16" in failure(
        script("convert_llava", tmp_path, "--outtype", "q9"), code=2
    )
    line = failure(script("convert_llava", tmp_path, "--template", "no"), code=2)
    assert "'no', need one of " in line
    assert "no config.json; need the folder of a LLaVA model" in failure(script("convert_llava", tmp_path))
    write_hf(tmp_path / "m", SPEC)
    assert "need a plain file name" in failure(script("convert_llava", tmp_path / "m", "--name", "a/b"))


# Files


def test_neither_file_without_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file fails, or the library refuses the pair: what was there before is there still."""
    folder = original_15(tmp_path / "m")
    model = convert(folder, tmp_path / "out", PLAIN)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {model.model, model.mmproj}
    tensors = {**language_tensors(SPEC), **projector_tensors(SPEC)}
    tensors["lm_head.weight"][3, 3] = np.inf
    write_shards(folder, tensors, "bf16", shards=2)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*holds NaN or infinity"):
        convert(folder, tmp_path / "out", PLAIN)
    write_llava_checkpoint(folder, TinySpec(seed=3, dtype="bf16"), shards=2)

    def refuse(*_: Path) -> bool:
        raise OutputError("pyllava refuses what was written: no")

    monkeypatch.setattr(llava_model, "opened_by_library", refuse)
    with pytest.raises(OutputError, match="refuses"):
        convert(folder, tmp_path / "out", Options("f32", "f32"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_files_that_are_there_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = original_15(tmp_path / "m")
    out = tmp_path / "out"
    argv = [str(folder), "-o", str(out), "--no-check"]
    assert main(argv) == 0
    assert "\nconverted in " in capsys.readouterr().err
    for kept in list(out.iterdir()):
        before = kept.read_bytes()
        (others,) = (path for path in out.iterdir() if path != kept)
        others.unlink()
        assert main(argv) == 1
        told = f"{kept}: exists already; --force, in Python overwrite=True, replaces it"
        assert capsys.readouterr().err.splitlines()[-1] == f"convert_llava: error: {told}"
        assert list(out.iterdir()) == [kept]
        assert main([*argv, "--force"]) == 0
        assert kept.read_bytes() == before
        capsys.readouterr()
    assert len(list(out.iterdir())) == 2


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """An interrupt in the middle of the second file."""
    spec = TinySpec(n_embd=768, n_head=8, n_head_kv=8, n_ff=3072, n_layer=4, dtype="bf16")
    folder = original_15(tmp_path / "m", spec)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, ROOT / "convert" / "convert_llava.py", folder, "-o", out, "--outtype", "q8_0"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(out.glob("m-*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(out.glob("mmproj-*.part"))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.endswith("convert_llava: error: interrupted\n")
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []


def test_output_and_hint(tmp_path: Path, script) -> None:
    original_16(tmp_path / "llava-v1.6-vicuna-7b")
    result = script("convert_llava", "llava-v1.6-vicuna-7b", "-o", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    name = "llava-v1.6-vicuna-7b"
    assert result.stdout == f"out/{name}-f16.gguf\nout/mmproj-{name}-f16.gguf\n"
    assert f"{name}: LLaVA-1.6 in the original layout" in result.stderr
    assert "opened with pyllava: both files fit together" in result.stderr
    hint = f"now ask: pyllava-cli -m out/{name}-f16.gguf --image IMAGE.jpg -p 'What is this?'\n"
    assert result.stderr.endswith(hint)


def test_hint_names_the_projector_among_others(tmp_path: Path) -> None:
    (tmp_path / "mmproj-a.gguf").touch()
    assert "--mmproj" not in command(tmp_path / "a.gguf", tmp_path / "mmproj-a.gguf")
    (tmp_path / "mmproj-b.gguf").touch()
    assert f"--mmproj {tmp_path}/mmproj-a.gguf" in command(tmp_path / "a.gguf", tmp_path / "mmproj-a.gguf")


def test_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "llava-link").symlink_to("real")
    assert model_name(tmp_path / "llava-link") == "llava-link"
    monkeypatch.chdir(tmp_path / "real")
    assert model_name(Path(".")) == "real"
    cache = (
        tmp_path
        / "models--llava-hf--llava-1.5-7b-hf"
        / "snapshots"
        / "8c85e9a4d626b7b908448be32c1ba5ad79b95e76"
    )
    assert model_name(cache) == "llava-1.5-7b-hf"


def test_command_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pyllava-cli convert`: the same converter, found in the source tree, with the same options and exit
    codes.
    """
    folder = original_15(tmp_path / "m")
    convert_command([str(folder), "-o", str(tmp_path / "out"), "--outtype", "f32"])
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "out" / "m-f32.gguf")
    direct = convert(folder, tmp_path / "other", Options(outtype="f32"))
    assert (tmp_path / "out" / "m-f32.gguf").read_bytes() == direct.model.read_bytes()
    with pytest.raises(SystemExit) as exit:
        convert_command([str(tmp_path)])
    assert exit.value.code == 1
    assert "pyllava-cli convert: error:" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        convert_command(["--help"])
    assert exit.value.code == 0
    assert "usage: pyllava-cli convert" in capsys.readouterr().out


@pytest.mark.parametrize("share", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["original", "hugging-face"])
def test_any_value_in_any_setting(
    tmp_path: Path, name: str, share: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in config.json: two files or one line, never a traceback. (A sixteenth of the cases, or
    all.)
    """
    spec = TinySpec(n_layer=1)
    write_tower_config(tmp_path / "clip-tiny", spec)
    folder = tmp_path / "m"
    if name == "original":
        write_16(folder, spec)
    else:
        write_hf(folder, spec, tiles=True)
    table = json.loads((folder / "config.json").read_text())
    cases = [
        {**table, key: value} for key in (*table, "_name_or_path", "rope_parameters") for value in STRANGE
    ]
    for nested in ("text_config", "vision_config"):
        inner = table.get(nested, {})
        cases += [{**table, nested: {**inner, key: value}} for key in inner for value in STRANGE]
    codes = []
    for case in cases[::share]:
        (folder / "config.json").write_text(json.dumps(case))
        codes.append(main([str(folder), "--no-check"]))
        codes.append(surgery_main(["--write-vit-config", str(folder), "-o", str(tmp_path / "vit")]))
        errors = capfd.readouterr().err
        assert "Traceback" not in errors, case
        assert len([line for line in errors.splitlines() if ": error:" in line]) == sum(codes[-2:]), case
    assert codes.count(0) > len(codes) // 8
