"""Published layouts that hold the same model in other pieces: Phi-3's fused matrices, the folders of xtuner."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_gguf
from layouts import write_hf
from test_convert_vocabulary import fast_tokenizer
from tiny import TinySpec, tokenizer_model

from pyllava.convert.errors import CheckpointError
from pyllava.convert.llava_model import Model, Options, convert

SPEC = TinySpec()
PLAIN = Options(outtype="f32", mmproj_outtype="f32", name="m", check=False)


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
        ({"model_type": "phi"}, "a model of type 'phi'"),
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
    folder, table = write_hf(tmp_path / "llava-phi-3-mini", TinySpec(n_vocab=384)), phi3_tokenizer()
    more = {str(entry["id"]): entry for entry in table["added_tokens"]}
    if source == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(table))
    else:
        edit(folder / "tokenizer_config.json", added_tokens_decoder=more)
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
