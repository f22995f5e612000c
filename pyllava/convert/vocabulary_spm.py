"""The vocabulary of a SentencePiece model, and the tokens that the files beside it add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoints.json_file import read_json_if_there
from .errors import CheckpointError, shown
from .script import log
from .sentencepiece_model import BPE, MAX_PIECES, read_sentencepiece
from .special_tokens import CONTROL_LIKE, added_token, special_texts, stripping
from .vocabulary import CONTROL, NORMAL, USER_DEFINED, Token, Vocabulary


def read_spm(path: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> Vocabulary:
    model = read_sentencepiece(path)
    if model.model_type != BPE:
        raise CheckpointError(
            f"{path}: not a BPE model (type {model.model_type}); GGUF's tokenizer merges pairs by score"
        )
    if model.normalizes or model.remove_extra_whitespaces:
        log.info("%s normalises its text before the pieces; GGUF readers do not", path.name)
    special = special_texts(settings)
    base = [Token(piece.text, piece.score, _kind(piece.text, piece.kind, special)) for piece in model.pieces]
    added = _added_tokens(
        path.parent, settings, len(base), [token.text for token in base], set(names.values())
    )
    decoder = _decoder(settings)
    ids = {name: i for name, i in model.special_ids.items() if 0 <= i < len(base)}
    return Vocabulary(
        path,
        (*base, *added),
        len(base),
        ids,
        add_space_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
        lstrip=stripping("lstrip", decoder),
        rstrip=stripping("rstrip", decoder),
    )


def _kind(text: str, kind: int, special: set[str]) -> int:
    """User-defined pieces stay user-defined, but `<|im_start|>` and its like (Yi), and what the tokenizer's
    settings call special, are control tokens: found in a template as one id, as HF does, and never read from
    a user's text.
    """
    if text in special:
        return CONTROL if kind in (NORMAL, USER_DEFINED) else kind
    return CONTROL if kind == USER_DEFINED and CONTROL_LIKE.fullmatch(text) else kind


def _added_tokens(
    folder: Path, settings: Mapping[str, Any], n_base: int, base: Sequence[str], special: set[str]
) -> list[Token]:
    """added_tokens.json and added_tokens_decoder of tokenizer_config.json: ids from `n_base` on, no gap."""
    texts: dict[int, str] = {}
    for text, i in read_json_if_there(folder / "added_tokens.json").items():
        _note(texts, folder / "added_tokens.json", i, text)
    for i, entry in _decoder(settings).items():
        _note(texts, folder / "tokenizer_config.json", i, entry.get("content"))
    special = special | special_texts(settings)
    for i, text in texts.items():
        if i < n_base and base[i] != text:
            raise CheckpointError(
                f"{folder}: added token {shown(text)} claims id {i}, which is {shown(base[i])}"
            )
    wanted = sorted(i for i in texts if i >= n_base)
    if wanted != list(range(n_base, n_base + len(wanted))):
        raise CheckpointError(
            f"{folder}: Expected new token IDs from {n_base} on to be sequential, found {wanted[:8]}"
        )
    return [added_token(texts[i], texts[i] in special) for i in wanted]


def _decoder(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What tokenizer_config.json says of tokens, by id."""
    decoder = settings.get("added_tokens_decoder")
    return {
        int(key): entry
        for key, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict) and key.isdecimal() and len(key) < 10
    }


def _note(texts: dict[int, str], path: Path, i: Any, text: Any) -> None:
    if type(i) is not int or not 0 <= i < MAX_PIECES or not isinstance(text, str):
        raise CheckpointError(f"{path}: added token {shown(text)} with id {shown(i)}")
    if texts.setdefault(i, text) != text:
        raise CheckpointError(f"{path}: id {i} is both {shown(texts[i])} and {shown(text)}")
