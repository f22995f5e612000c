"""Byte-level BPE from a `tokenizer.json`: tokens, merges, and the rule by which texts are cut before merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, shown
from .script import log
from .sentencepiece_model import MAX_PIECES
from .special_tokens import added_token, stripping
from .vocabulary import NORMAL, Token, Vocabulary, filler

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_RULES = {  # expressions, one pass after the other; whether whole pieces are tokens; normalisation form C -> name
    ((_LLAMA_3,), True, False): "llama-bpe",
    ((_LLAMA_3,), False, False): "smaug-bpe",
    ((_QWEN_2,), False, True): "qwen2",
    ((_QWEN_2,), False, False): "stablelm2",
    ((_GPT2,), False, False): "gpt-2",
    ((r"\p{N}", _GPT2), False, False): "starcoder",
}


def is_byte_level(table: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` turns bytes into characters before it merges them."""
    return any(step.get("type") == "ByteLevel" for step in _steps(table.get("pre_tokenizer")))


def read_bpe(path: Path, table: Mapping[str, Any], special: set[str]) -> Vocabulary:
    """`table`: the parsed file; `special`: texts that the settings name as bos, eos and so on."""
    model = table["model"]
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{path}: byte-level {shown(model.get('type'))}, need BPE")
    by_id: dict[int, Token] = {}
    for text, i in model["vocab"].items():
        place(by_id, path, i, Token(text, 0.0, NORMAL))
    n_base = len(by_id)
    added = {}
    for entry in table.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: an added token without content")
        i, text = entry.get("id"), entry["content"]
        if type(i) is int and i in by_id and by_id[i].text == text:
            del by_id[i]
        place(by_id, path, i, added_token(text, entry.get("special") is True or text in special))
        added[i] = entry
    tokens = tuple(by_id.get(i) or filler(i) for i in range(max(by_id, default=-1) + 1))
    return Vocabulary(
        path,
        tokens,
        n_base,
        {},
        add_bos=_begins_with_bos(table),
        add_space_prefix=False,
        pre=_rule(path, table),
        merges=tuple(" ".join(pair) for pair in merge_pairs(path, model.get("merges"))),
        lstrip=stripping("lstrip", added),
        rstrip=stripping("rstrip", added),
    )


def merge_pairs(path: Path, merges: Any) -> Iterator[tuple[str, str]]:
    """In order of rank. A merge is "a b" or ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: holds no merges")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{path}: merge {shown(merge)} is not a pair")
        yield parts[0], parts[1]


def place(by_id: dict[int, Token], path: Path, i: Any, token: Token) -> None:
    """Puts a token at its id, where none is yet."""
    if type(i) is not int or not 0 <= i < MAX_PIECES or i in by_id:
        raise CheckpointError(f"{path}: token {shown(token.text)} with id {shown(i)}")
    by_id[i] = token


def _steps(step: Any) -> list[Mapping[str, Any]]:
    """What a normalizer, pre-tokenizer or post-processor consists of, one after the other."""
    if not isinstance(step, dict):
        return []
    if step.get("type") != "Sequence":
        return [step]
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("processors")
    return [found for part in (inner if isinstance(inner, list) else []) for found in _steps(part)]


def _rule(path: Path, table: Mapping[str, Any]) -> str:
    """The name that GGUF has for how texts are cut."""
    expressions = tuple(e for step in _steps(table.get("pre_tokenizer")) for e in _expressions(path, step))
    normalizers = [str(step.get("type")) for step in _steps(table.get("normalizer"))]
    whole = table["model"].get("ignore_merges") is True
    composes = normalizers == ["NFC"]
    name = _RULES.get((expressions, whole, composes))
    if name is None and composes:
        name = _RULES.get((expressions, whole, False))
        log.info(
            "%s composes its text (NFC) before it is cut; GGUF readers do not with '%s'", path.name, name
        )
    if name is None or (normalizers and not composes):
        found = f"{' then '.join(expressions)}, ignore_merges {whole}, normalizers {normalizers}"
        raise CheckpointError(
            f"{path}: cuts texts in a way that GGUF has no name for here: {shown(found, 400)}"
        )
    return name


def _expressions(path: Path, step: Mapping[str, Any]) -> list[str]:
    """A step of a pre-tokenizer as regular expressions whose matches are pieces, and what is left is too."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "ByteLevel" and step.get("add_prefix_space") is not True:
        return [_GPT2] if step.get("use_regex") is not False else []
    if kind == "Digits" and step.get("individual_digits") is True:
        return [r"\p{N}"]
    pieces = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and pieces and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        return [pattern["Regex"]]
    raise CheckpointError(
        f"{path}: pre-tokenizer {shown(str(dict(step)), 200)} is none that GGUF has a name for"
    )


def _begins_with_bos(table: Mapping[str, Any]) -> bool:
    """Whether the post-processor puts a special token in front of a text."""
    for step in _steps(table.get("post_processor")):
        single = step.get("single")
        if (
            isinstance(single, list)
            and single
            and isinstance(single[0], dict)
            and "SpecialToken" in single[0]
        ):
            return True
    return False
