"""Vocabularies: SentencePiece files, tokenizer.json, added tokens, sizes that do not match, special ids."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, failure, read_gguf
from tiny import TinySpec, sentences, tokenizer_model, write_llava_checkpoint

from pyllava.convert.errors import CheckpointError
from pyllava.convert.language_model import Options, convert
from pyllava.convert.sentencepiece_model import read_sentencepiece
from pyllava.convert.tokenizer_files import read_vocabulary
from pyllava.convert.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary

SPEC = TinySpec()
REAL = ROOT.parent / "shared" / "data" / "vocab" / "ggml-vocab-llama-spm.gguf"


def library() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(SPEC.n_vocab))


def merged(vocabulary: Vocabulary, text: str) -> list[int]:
    """CONTRACT 5.1, slowly: merge the adjacent pair with the best score, leftmost first; bytes for what is left."""
    ids = {token.text: i for i, token in enumerate(vocabulary.tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        best = None
        for i in range(len(parts) - 1):
            token = ids.get(parts[i] + parts[i + 1])
            if token is not None and (best is None or vocabulary.tokens[token].score > best[0]):
                best = (vocabulary.tokens[token].score, i)
        if best is None:
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def texts(n: int = 60) -> list[str]:
    rng = np.random.RandomState(4)
    lines = sentences()[:n]
    odd = [
        "",
        " ",
        "  two  spaces ",
        "\n\ttab",
        "\u4e2d\u6587 \U0001f600 caf\u00e9",
        "</s><s><unk>",
        "A" * 40,
        "0123456789",
    ]
    return odd + [line[: rng.randint(1, len(line))] for line in lines]


@pytest.mark.parametrize("n_vocab", [340, 384, 500])
def test_pieces_equal_the_library(tmp_path: Path, n_vocab: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model(n_vocab))
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert len(model.pieces) == spm.get_piece_size() == n_vocab
    for i, piece in enumerate(model.pieces):
        assert piece.text == spm.id_to_piece(i)
        assert piece.score == spm.get_score(i)
        flags = (spm.is_unknown(i), spm.is_control(i), spm.is_unused(i), spm.is_byte(i))
        assert flags == (piece.kind == 2, piece.kind == 3, piece.kind == 5, piece.kind == 6)
    assert model.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    assert model.add_dummy_prefix
    assert not model.remove_extra_whitespaces
    assert not model.normalizes
    assert model.model_type == 2


def test_written_vocabulary_tokenizes_as_the_library(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    vocabulary = read_vocabulary(tmp_path, ("spm",), {})
    spm = library()
    for text in texts():
        assert merged(vocabulary, text) == spm.encode(text) or text == "", text


def test_keys(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    file, spm = read_gguf(convert(tmp_path, Options(skip_unknown=True))), library()
    kv = {key: value for key, value in file.kv.items() if key.startswith("tokenizer.")}
    assert kv.pop("tokenizer.ggml.tokens") == [spm.id_to_piece(i) for i in range(SPEC.n_vocab)]
    assert kv.pop("tokenizer.ggml.scores") == [spm.get_score(i) for i in range(SPEC.n_vocab)]
    assert kv.pop("tokenizer.ggml.token_type") == [2, 3, 3] + [6] * 256 + [1] * (SPEC.n_vocab - 259)
    assert kv == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    types = {key: [kind.name for kind in kinds] for key, kinds in file.types.items()}
    assert types["tokenizer.ggml.scores"] == ["ARRAY", "FLOAT32"]
    assert types["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"]
    assert types["tokenizer.ggml.add_bos_token"] == ["BOOL"]


def test_vocab_only_and_vocab_dir(tmp_path: Path, script) -> None:
    write_llava_checkpoint(tmp_path / "m", SPEC)
    (tmp_path / "m" / "model.safetensors").unlink()
    result = script("convert_legacy_llama", tmp_path / "m", "--vocab-only")
    assert result.stdout == f"{tmp_path / 'm' / 'ggml-vocab.gguf'}\n"
    file = read_gguf(tmp_path / "m" / "ggml-vocab.gguf")
    assert file.tensors == {}
    assert len(file.kv["tokenizer.ggml.tokens"]) == SPEC.n_vocab
    (tmp_path / "t").mkdir()
    (tmp_path / "m" / "tokenizer.model").rename(tmp_path / "t" / "tokenizer.model")
    assert "no tokenizer.model" in failure(script("convert_legacy_llama", tmp_path / "m", "--vocab-only"))
    run = ("convert_legacy_llama", tmp_path / "m", "--vocab-only", "--vocab-dir", tmp_path / "t")
    assert script(*run).returncode == 0
    assert "kinds hfft" in failure(script(*run, "--vocab-type", "hfft"))


# A vocabulary that is not as long as the embedding


def with_rows(folder: Path, rows: int, added: dict[str, int] | None = None) -> None:
    """A checkpoint whose embedding has `rows` rows and whose tokenizer has 384 pieces and the added ones."""
    write_llava_checkpoint(folder, TinySpec(n_vocab=rows), added=added, projector=False) if rows in (
        340,
        500,
    ) else None
    if rows not in (340, 500):
        from tiny import language_tensors, write_shards

        write_llava_checkpoint(folder, SPEC, added=added, projector=False)
        tensors = language_tensors(SPEC)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.resize(tensors[name], (rows, SPEC.n_embd)).copy()
        write_shards(folder, tensors, "f32")
    (folder / "tokenizer.model").write_bytes(tokenizer_model(SPEC.n_vocab))


def test_added_tokens_with_rows(tmp_path: Path) -> None:
    with_rows(tmp_path, 388, {"<image>": 385, "<pad>": 384, "<|im_start|>": 386, "<word>": 387})
    kv = read_gguf(convert(tmp_path, Options())).kv
    assert kv["tokenizer.ggml.tokens"][384:] == ["<pad>", "<image>", "<|im_start|>", "<word>"]
    assert kv["tokenizer.ggml.token_type"][384:] == [CONTROL, CONTROL, CONTROL, USER_DEFINED]
    assert kv["tokenizer.ggml.scores"][384:] == [-1000.0] * 4


def test_added_tokens_without_rows(tmp_path: Path, script) -> None:
    """What made the original surgery blank added_tokens.json: `<image>` and `<pad>` that have no embedding."""
    with_rows(tmp_path, 384, {"<pad>": 384, "<image>": 385})
    line = failure(script("convert_legacy_llama", tmp_path))
    assert "Vocab size mismatch (model has 384, but" in line
    assert "has 386)" in line
    assert "--skip-unknown" in line
    result = script("convert_legacy_llama", tmp_path, "--skip-unknown")
    assert result.returncode == 0
    assert "left out 2 added tokens" in result.stderr
    assert len(read_gguf(tmp_path / "ggml-model-f16.gguf").kv["tokenizer.ggml.tokens"]) == 384
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<pad>": 384, "<image>": 385}


def test_part_of_the_added_tokens_has_rows(tmp_path: Path) -> None:
    with_rows(tmp_path, 385, {"<pad>": 384, "<image>": 385})
    kv = read_gguf(convert(tmp_path, Options(skip_unknown=True))).kv
    assert kv["tokenizer.ggml.tokens"][384:] == ["<pad>"]


def test_trained_pieces_are_never_dropped(tmp_path: Path) -> None:
    with_rows(tmp_path, 340)
    with pytest.raises(CheckpointError, match="384 of them are trained pieces"):
        convert(tmp_path, Options(skip_unknown=True))


def test_short_vocabulary(tmp_path: Path, script) -> None:
    with_rows(tmp_path, 390)
    line = failure(script("convert_legacy_llama", tmp_path))
    assert "model has 390" in line
    assert "added_tokens.json is missing" in line
    assert "--pad-vocab" in line
    assert script("convert_legacy_llama", tmp_path, "--pad-vocab").returncode == 0
    kv = read_gguf(tmp_path / "ggml-model-f16.gguf").kv
    assert kv["tokenizer.ggml.tokens"][384:] == [f"<dummy{i:05}>" for i in range(1, 7)]
    assert kv["tokenizer.ggml.token_type"][384:] == [UNUSED] * 6
    assert kv["llama.vocab_size"] == 390


def test_very_short_vocabulary_has_no_hint_of_added_tokens(tmp_path: Path) -> None:
    with_rows(tmp_path, 500)
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path, Options())
    assert "added_tokens.json" not in str(error.value)
    assert "--pad-vocab" in str(error.value)


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ({"<a>": 385}, "sequential"),
        ({"<a>": 384, "<b>": 386}, "sequential"),
        ({"<a>": 3}, "claims id 3"),
        ({"<a>": "384"}, "with id '384'"),
        ({"<a>": -1}, "with id -1"),
        ({"</s>": 384}, "are both '</s>'"),
        ({"": 384}, "empty"),
    ],
)
def test_bad_added_tokens(tmp_path: Path, added: dict[str, Any], text: str) -> None:
    with_rows(tmp_path, 384, added)
    with pytest.raises(CheckpointError, match=text):
        convert(tmp_path, Options(skip_unknown=True))


def test_added_tokens_of_tokenizer_config(tmp_path: Path) -> None:
    with_rows(tmp_path, 386)
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "384": {"content": "<image>", "special": True},
        "385": {"content": "<word>", "special": False},
    }
    settings = {"added_tokens_decoder": decoder, "eos_token": {"content": "<image>"}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    kv = read_gguf(convert(tmp_path, Options())).kv
    assert kv["tokenizer.ggml.token_type"][384:] == [CONTROL, USER_DEFINED]
    assert kv["tokenizer.ggml.eos_token_id"] == 384
    assert kv["tokenizer.ggml.add_bos_token"] is False


def test_second_end_of_an_answer(tmp_path: Path) -> None:
    """generation_config.json may list more ends than one; the first control token of them that is not eos."""
    with_rows(tmp_path, 386, {"<|im_start|>": 384, "<|done|>": 385})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 260, 385]}')
    kv = read_gguf(convert(tmp_path, Options())).kv
    assert kv["tokenizer.ggml.eos_token_id"] == 2
    assert kv["tokenizer.ggml.eot_token_id"] == 385


def test_pieces_that_the_tokenizer_calls_special(tmp_path: Path) -> None:
    with_rows(tmp_path, 384)
    text = library().id_to_piece(300)
    decoder = {"300": {"content": text, "special": True}, "5": {"content": "<0x02>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    kinds = read_gguf(convert(tmp_path, Options())).kv["tokenizer.ggml.token_type"]
    assert (kinds[300], kinds[5], kinds[301]) == (CONTROL, 6, NORMAL)


# Other SentencePiece models


def trained(folder: Path, **options: Any) -> None:
    settings = {
        "vocab_size": 384,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    settings |= {"remove_extra_whitespaces": False, "num_threads": 1, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=str(folder / "tokenizer"), **settings
    )


def test_user_defined_pieces(tmp_path: Path) -> None:
    """Yi: `<|im_start|>` becomes a control token, another user-defined piece stays one."""
    trained(tmp_path, user_defined_symbols=["<|im_start|>", "<word>"], control_symbols=["<ctl>"])
    vocabulary = read_vocabulary(tmp_path, ("spm",), {})
    kinds = {token.text: token.kind for token in vocabulary.tokens}
    assert kinds["<|im_start|>"] == CONTROL
    assert kinds["<word>"] == USER_DEFINED
    assert kinds["<ctl>"] == CONTROL
    assert kinds["\u2581t"] == NORMAL


def test_trainer_settings_are_kept(tmp_path: Path) -> None:
    trained(
        tmp_path,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        pad_id=3,
        normalization_rule_name="nmt_nfkc",
    )
    vocabulary = read_vocabulary(tmp_path, ("spm",), {})
    assert not vocabulary.add_space_prefix
    assert vocabulary.remove_extra_whitespaces
    assert vocabulary.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert read_sentencepiece(tmp_path / "tokenizer.model").normalizes


def test_model_without_bos(tmp_path: Path) -> None:
    trained(tmp_path, bos_id=-1, eos_id=1)
    vocabulary = read_vocabulary(tmp_path, ("spm",), {"eos": 7})
    assert vocabulary.special_ids == {"unk": 0, "eos": 7}
    assert vocabulary.add_bos is False


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 200}, "trained with byte_fallback"),
        ({"eos_id": -1}, "no eos token"),
    ],
)
def test_models_that_gguf_cannot_hold(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    trained(tmp_path, **options)
    with pytest.raises(CheckpointError, match=text):
        read_vocabulary(tmp_path, ("spm",), {})


def test_damaged_models(tmp_path: Path) -> None:
    """Cut at every byte, and every byte flipped: a model or a CheckpointError, nothing else."""
    data, path = tokenizer_model(340), tmp_path / "tokenizer.model"
    n_refused = 0
    for i in range(0, len(data), 7):
        for bad in (data[:i], data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]):
            path.write_bytes(bad)
            try:
                read_vocabulary(tmp_path, ("spm",), {})
            except CheckpointError:
                n_refused += 1
    assert n_refused > len(data) // 7
    for bad in (
        b"",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x0a" + b"\xff" * 9 + b"\x01",
        b"hello",
    ):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="not a SentencePiece model"):
            read_sentencepiece(path)


# tokenizer.json


def fast_tokenizer(model_bytes: bytes) -> dict[str, Any]:
    """The same vocabulary as transformers stores it: every split of every piece into two pieces, best score first."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    vocab = {spm.id_to_piece(i): i for i in range(spm.get_piece_size())}
    merges = []
    for text, i in vocab.items():
        for cut in range(1, len(text)):
            if i >= 259 and text[:cut] in vocab and text[cut:] in vocab:
                merges.append(
                    (-spm.get_score(i), vocab[text[:cut]], vocab[text[cut:]], [text[:cut], text[cut:]])
                )
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": text, **plain} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    return {
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
            "vocab": vocab, "merges": [merge for *_, merge in sorted(merges, key=lambda m: m[:3])],
        },
    }  # fmt: skip


@pytest.mark.parametrize("merge_form", ["list", "text"])
def test_fast_tokenizer_gives_the_same_ids(tmp_path: Path, merge_form: str) -> None:
    table = fast_tokenizer(tokenizer_model(SPEC.n_vocab))
    if merge_form == "text":
        table["model"]["merges"] = [" ".join(merge) for merge in table["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary, spm = read_vocabulary(tmp_path, ("spm", "hfft"), {}), library()
    assert [token.text for token in vocabulary.tokens] == [spm.id_to_piece(i) for i in range(SPEC.n_vocab)]
    assert [token.kind for token in vocabulary.tokens[:260]] == [2, 3, 3, *[6] * 256, 1]
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert vocabulary.add_space_prefix
    for text in texts():
        assert merged(vocabulary, text) == spm.encode(text) or text == "", text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t["model"].update(byte_fallback=False), "nor SentencePiece-style"),
        (lambda t: t["model"].update(type="WordPiece"), "nor SentencePiece-style"),
        (lambda t: t["model"].pop("vocab"), "holds no vocabulary"),
        (lambda t: t["model"].update(merges=[["a", 3]]), "is not a pair"),
        (lambda t: t["model"].update(merges="x"), "holds no merges"),
        (lambda t: t["model"]["vocab"].update(x=5), "'x' with id 5"),
        (lambda t: t["model"]["vocab"].update(x=5000), "leave gaps"),
        (lambda t: t["model"]["vocab"].pop("<0x41>"), "leave gaps"),
        (lambda t: t["added_tokens"].append({"id": 384}), "without content"),
        (lambda t: t["added_tokens"].append({"id": 2, "content": "x"}), "'x' with id 2"),
    ],
)
def test_bad_fast_tokenizers(tmp_path: Path, change: Any, text: str) -> None:
    table = fast_tokenizer(tokenizer_model(SPEC.n_vocab))
    change(table)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=text):
        read_vocabulary(tmp_path, ("hfft",), {"eos": 2, "bos": 1, "unk": 0})


# Templates


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, None),
        ({"chat_template": "{{ x }}"}, "{{ x }}"),
        ({"chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]}, "b"),
        ({"chat_template": "x" * ((1 << 20) + 1)}, None),
        ({"chat_template": 3}, None),
    ],
)
def test_chat_template(tmp_path: Path, settings: dict[str, Any], wanted: str | None) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    kv = read_gguf(convert(tmp_path, Options(skip_unknown=True))).kv
    assert kv.get("tokenizer.chat_template") == wanted


def test_a_chat_template_from_windows(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path / "m", TinySpec())
    (tmp_path / "m" / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ x }}\r\n{{ y }}")
    assert read_vocabulary(tmp_path / "m", ("spm",), {}).chat_template == "{{ x }}\n{{ y }}"


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
def test_chat_template_files(tmp_path: Path, name: str) -> None:
    write_llava_checkpoint(tmp_path, SPEC)
    (tmp_path / name).write_text(
        "{{ y }}" if name.endswith("jinja") else json.dumps({"chat_template": "{{ y }}"})
    )
    assert read_vocabulary(tmp_path, ("spm",), {}).chat_template == "{{ y }}"


# The real LLaMA vocabulary


def message(number: int, data: bytes) -> bytes:
    size, out = len(data), bytearray([number << 3 | 2])
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(out) + bytes([size]) + data


@pytest.mark.skipif(not REAL.exists(), reason="needs the real LLaMA vocabulary")
def test_llama_vocabulary(tmp_path: Path) -> None:
    """The 32,000 pieces, put into a SentencePiece file and converted, come out as llama.cpp's own file has them."""
    real = read_gguf(REAL).kv
    names = ("tokens", "scores", "token_type")
    columns = [real[f"tokenizer.ggml.{name}"] for name in names]
    data = b""
    for text, score, kind in zip(*columns, strict=True):
        piece = (
            message(1, text.encode())
            + b"\x15"
            + struct.pack("<f", score)
            + (b"" if kind == 1 else bytes([0x18, kind]))
        )
        data += message(1, piece)
    data += message(
        2, b"\x18\x02\x98\x02\x01" + b"\xc0\x02\x00\xc8\x02\x01\xd0\x02\x02\xd8\x02" + b"\xff" * 9 + b"\x01"
    )
    data += message(3, b"\x18\x01\x20\x00")
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size() == 32000
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32000,
        "intermediate_size": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }))  # fmt: skip
    ours = read_gguf(convert(tmp_path, Options(vocab_only=True))).kv
    for name in (*names, "bos_token_id", "eos_token_id", "unknown_token_id", "model"):
        assert ours[f"tokenizer.ggml.{name}"] == real[f"tokenizer.ggml.{name}"], name
