"""Byte-level BPE of the `tokenizers` library: the rules by name, trained vocabularies, and the keys of files with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny

tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

NORMAL, CONTROL, USER = 1, 3, 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The rules as regular expressions, one pass after the other.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Rule:
    name: str
    passes: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False

    def tokenizer(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
        model = tokenizers.models.BPE(vocab, list(merges), ignore_merges=self.ignore_merges)
        return self.around(model)

    def around(self, model: Any) -> Any:
        found = tokenizers.Tokenizer(model)
        pre = tokenizers.pre_tokenizers
        cuts = [pre.Split(tokenizers.Regex(expression), "isolated") for expression in self.passes]
        found.pre_tokenizer = pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        if self.nfc:
            found.normalizer = tokenizers.normalizers.NFC()
        return found


LLAMA_BPE = Rule("llama-bpe", (_LLAMA3,), ignore_merges=True)
QWEN2 = Rule("qwen2", (_LLAMA3.replace("{1,3}", ""),), nfc=True)
RULES = {
    rule.name: rule
    for rule in (
        LLAMA_BPE,
        Rule("smaug-bpe", (_LLAMA3,)),
        QWEN2,
        Rule("stablelm2", QWEN2.passes),
        Rule("gpt-2", (_GPT2,)),
        Rule("smollm", (r"\p{N}", _GPT2)),
        Rule("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    )
}


def trained(rule: Rule, n_vocab: int = 600) -> Any:
    """Trained on a small language's words, with all bytes, and special tokens in front."""
    found = rule.around(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    more = (
        ["12 345 6789 1000000"] * 9
        + ["\u4e2d\u6587 \u00e9t\u00e9 \n\n   x\t\t  y"] * 9
        + ["don't I'LL we've"] * 9
    )
    found.train_from_iterator([*tiny.sentences(), *more], trainer)
    return found


def parts_of(judge: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer of the library."""
    model = json.loads(judge.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


Keys = dict[str, tuple[Any, Any, Any]]


def keys_of(
    texts: Sequence[str],
    merges: Sequence[tuple[str, str]],
    pre: str | None,
    kinds: dict[str, int] | None = None,
    **more: tuple[Any, Any, Any],
) -> Keys:
    """The keys of a file with this vocabulary; tokens like "<|im_end|>" are control tokens."""
    kind = gguf.GGUFValueType
    told = [(kinds or {}).get(text, CONTROL if text in SPECIAL else NORMAL) for text in texts]
    return {
        "tokenizer.ggml.model": ("gpt2", kind.STRING, None),
        **({"tokenizer.ggml.pre": (pre, kind.STRING, None)} if pre is not None else {}),
        "tokenizer.ggml.tokens": (list(texts), kind.ARRAY, kind.STRING),
        "tokenizer.ggml.token_type": (told, kind.ARRAY, kind.INT32),
        "tokenizer.ggml.merges": ([f"{a} {b}" for a, b in merges], kind.ARRAY, kind.STRING),
        "tokenizer.ggml.bos_token_id": (0, kind.UINT32, None),
        "tokenizer.ggml.eos_token_id": (2, kind.UINT32, None),
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


def texts_of(vocab: dict[str, int]) -> list[str]:
    return sorted(vocab, key=vocab.__getitem__)


def judge_of(rule: Rule, keys: Keys) -> Any:
    """The vocabulary in a file's keys as a tokenizer of the library, without special tokens."""
    texts, kinds, merges = (keys[f"tokenizer.ggml.{name}"][0] for name in ("tokens", "token_type", "merges"))
    told = list(zip(texts, kinds, strict=True))
    vocab = {text: i for i, (text, kind) in enumerate(told) if kind == NORMAL}
    return rule.tokenizer(vocab, [tuple(merge.split(" ")) for merge in merges])
