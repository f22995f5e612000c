"""The vocabulary of a `tokenizer.json`: SentencePiece-style here, byte-level BPE in vocabulary_bpe.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints.json_file import read_json
from .errors import CheckpointError
from .special_tokens import added_token, stripping
from .vocabulary import BYTE, BYTE_PIECES, NORMAL, UNKNOWN, Token, Vocabulary
from .vocabulary_bpe import is_byte_level, merge_pairs, place, read_bpe


def read_hf(path: Path, names: Mapping[str, str]) -> Vocabulary:
    """A BPE in Hugging Face's form. Of a SentencePiece-style one a piece's score is minus the rank of the merge
    that makes it, so that merging by score does what merging by rank does.
    """
    table = read_json(path)
    model = table.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: holds no vocabulary")
    if is_byte_level(table):
        return read_bpe(path, table, set(names.values()))
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") is not True:
        raise CheckpointError(
            f"{path}: neither byte-level BPE nor SentencePiece-style (BPE with byte_fallback); need tokenizer.model"
        )
    ranks: dict[str, int] = {}
    for left, right in merge_pairs(path, model.get("merges")):
        ranks.setdefault(left + right, len(ranks))
    by_id: dict[int, Token] = {}
    unknown = model.get("unk_token")
    for text, i in model["vocab"].items():
        kind = UNKNOWN if text == unknown else BYTE if text in BYTE_PIECES else NORMAL
        place(by_id, path, i, Token(text, -float(ranks.get(text, len(ranks))), kind))
    n_base = len(by_id)
    added = {}
    for entry in table.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: an added token without content")
        i, text = entry.get("id"), entry["content"]
        token = added_token(text, entry.get("special") is True or text in names.values())
        if type(i) is int and i in by_id and by_id[i].text == text:
            token = Token(text, by_id[i].score, UNKNOWN if by_id[i].kind == UNKNOWN else token.kind)
            del by_id[i]
        place(by_id, path, i, token)
        added[i] = entry
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(f"{path}: {len(by_id)} tokens whose ids leave gaps")
    tokens = tuple(by_id[i] for i in range(len(by_id)))
    kinds = [token.kind for token in tokens]
    ids = {"unk": kinds.index(UNKNOWN)} if UNKNOWN in kinds else {}
    return Vocabulary(
        path,
        tokens,
        n_base,
        ids,
        add_space_prefix=_adds_prefix(table),
        lstrip=stripping("lstrip", added),
        rstrip=stripping("rstrip", added),
    )


def _adds_prefix(table: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text: a Prepend normalizer or a Metaspace pre-tokenizer says so."""
    text = str(table.get("normalizer"))
    pre = table.get("pre_tokenizer")
    metaspace = isinstance(pre, dict) and pre.get("type") == "Metaspace"
    if metaspace and isinstance(pre, dict):
        return pre.get("prepend_scheme") != "never" and pre.get("add_prefix_space") is not False
    return "Prepend" in text
