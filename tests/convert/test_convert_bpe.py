"""Byte-level BPE from tokenizer.json through the converter and into the library: the ids of `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpe
import pytest
from bpe import QWEN2, RULES, SPECIAL, Rule
from conftest import read_gguf
from texts import strings
from tiny import TinySpec, write_llava_checkpoint

from pyllava import _lib
from pyllava.convert.errors import CheckpointError
from pyllava.convert.language_model import Options, convert
from pyllava.convert.tokenizer_files import read_vocabulary
from pyllava.convert.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

tokenizers = pytest.importorskip("tokenizers")

SPEC = TinySpec()
N_TOKENS = 370
Table = dict[str, Any]


def as_published(rule: Rule, table: Table) -> None:
    """The pre-tokenizer as the models' own files spell the rule."""
    if rule.name == "gpt-2":
        table["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if rule.name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    if rule.name == "stablelm2":
        (split, _) = table["pre_tokenizer"]["pretokenizers"]
        split |= {"behavior": "Removed", "invert": True}


def tokenizer_json(rule: Rule) -> Table:
    judge = bpe.trained(rule, N_TOKENS)
    judge.add_tokens([tokenizers.AddedToken("<box>", normalized=False)])
    judge.add_special_tokens(
        ["<image>", tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True, special=True, normalized=False)]
    )
    if rule.name == "llama-bpe":
        judge.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
    table: Table = json.loads(judge.to_str())
    as_published(rule, table)
    return table


def write(folder: Path, table: Table, **settings: Any) -> None:
    write_llava_checkpoint(folder, SPEC, projector=False)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(table))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))


@pytest.mark.parametrize("merge_form", ["list", "text"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "default"])
def test_ids_are_those_of_tokenizers(tmp_path: Path, name: str, merge_form: str) -> None:
    table = tokenizer_json(RULES[name])
    if merge_form == "text":
        table["model"]["merges"] = [" ".join(merge) for merge in table["model"]["merges"]]
    write(tmp_path, table)
    path = convert(tmp_path, Options())
    judge = tokenizers.Tokenizer.from_str(json.dumps(table))
    handle = _lib.ModelHandle(path, None)
    assert handle.info.n_vocab == SPEC.n_vocab
    assert handle.info.add_bos == (name == "llama-bpe")
    for text in [*strings(31, 500), *(f"the <mask> {mark}\n x<box> {mark}" for mark in SPECIAL)]:
        ids = handle.tokenize(text, add_bos=handle.info.add_bos)
        assert ids == judge.encode(text).ids, repr(text[:200])
    handle.close()


def test_keys(tmp_path: Path) -> None:
    table = tokenizer_json(QWEN2)
    write(tmp_path, table)
    kv = {k: v for k, v in read_gguf(convert(tmp_path, Options())).kv.items() if k.startswith(("tok", "pyl"))}
    texts, kinds = kv.pop("tokenizer.ggml.tokens"), kv.pop("tokenizer.ggml.token_type")
    n = N_TOKENS + 3
    assert texts[n - 3 :] == ["<box>", "<image>", "<mask>", *(f"[PAD{i}]" for i in range(n, SPEC.n_vocab))]
    expected = [CONTROL] * 3 + [NORMAL] * (N_TOKENS - 3) + [USER_DEFINED, CONTROL, CONTROL]
    assert kinds == expected + [UNUSED] * (SPEC.n_vocab - n)
    assert kv.pop("tokenizer.ggml.merges") == [" ".join(merge) for merge in table["model"]["merges"]]
    assert kv == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "pyllava.tokens_lstrip": [n - 1],
        "pyllava.tokens_rstrip": [n - 1],
    }


def test_settings_say_whether_prompts_begin_with_bos(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json(QWEN2), add_bos_token=True)
    assert read_vocabulary(tmp_path, ("hfft",), {}).add_bos


def test_gaps_between_ids_are_filled(tmp_path: Path) -> None:
    table = tokenizer_json(QWEN2)
    table["added_tokens"][-1]["id"] += 3
    write(tmp_path, table)
    tokens = read_vocabulary(tmp_path, ("hfft",), {}).tokens
    assert [(token.text, token.kind) for token in tokens[-4:-1]] == [
        (f"[PAD{i}]", UNUSED) for i in range(N_TOKENS + 2, N_TOKENS + 5)
    ]


def pre(table: Table) -> Table:
    found: Table = table["pre_tokenizer"]["pretokenizers"][0]
    return found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: pre(t)["pattern"].update(Regex=r"\w+|\s+"),
            r"cuts texts in a way.*w\+.*ignore_merges False",
        ),
        (lambda t: pre(t).update(pattern={"String": " "}), "is none that GGUF has a name for"),
        (lambda t: pre(t).update(behavior="MergedWithNext"), "is none that GGUF has a name for"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), r"normalizers \['Lowercase'\]"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges True"),
        (lambda t: t["model"].update(type="WordPiece"), "byte-level 'WordPiece', need BPE"),
        (lambda t: t["model"]["merges"].append(["a", 3]), "is not a pair"),
        (lambda t: t["model"]["merges"].insert(7, ["t", "zzz"]), "merge 7, 't zzz': no such tokens"),
        (lambda t: t["model"].pop("merges"), "holds no merges"),
        (lambda t: t["added_tokens"].append({"id": 900}), "without content"),
        (lambda t: t["added_tokens"].append({"id": 2, "content": "x"}), "'x' with id 2"),
    ],
)
def test_what_has_no_name(tmp_path: Path, change: Callable[[Table], object], text: str) -> None:
    table = tokenizer_json(QWEN2)
    change(table)
    write(tmp_path, table)
    with pytest.raises(CheckpointError, match=text):
        read_vocabulary(tmp_path, ("hfft",), {})


def test_composing_that_readers_do_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-NeoX's tokenizer composes and cuts as GPT-2: the file can say one of these."""
    table = tokenizer_json(RULES["gpt-2"])
    table["normalizer"] = {"type": "NFC"}
    write(tmp_path, table)
    with caplog.at_level("INFO"):
        assert read_vocabulary(tmp_path, ("hfft",), {}).pre == "gpt-2"
    assert "composes its text (NFC)" in caplog.text
