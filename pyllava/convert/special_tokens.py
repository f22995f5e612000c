"""Special tokens and the chat template: what a tokenizer's settings and a model's configs say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints.json_file import read_json_if_there
from .errors import CheckpointError
from .script import log
from .vocabulary import ADDED_SCORE, CONTROL, USER_DEFINED, Token, Vocabulary

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MAX_TEMPLATE = 1 << 20
CONTROL_LIKE = re.compile(r"<\|[^<>|]+\|>")
# What LLaVA's training and the Hugging Face layout add for themselves: never read from a user's words.
_PLACEHOLDERS = frozenset(("<image>", "<pad>", "<im_start>", "<im_end>", "<im_patch>"))
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


def added_token(text: str, special: bool) -> Token:
    special = special or text in _PLACEHOLDERS or CONTROL_LIKE.fullmatch(text) is not None
    kind = CONTROL if special else USER_DEFINED
    return Token(text, ADDED_SCORE, kind)


def stripping(side: str, added: Mapping[int, Any]) -> tuple[int, ...]:
    """Ids of the tokens that take the white space on a side ("lstrip", "rstrip") along; `added`: what is said of each."""
    return tuple(i for i, entry in added.items() if isinstance(entry, dict) and entry.get(side) is True)


def special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts that added_tokens_decoder calls special."""
    decoder = settings.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    return {
        entry["content"]
        for entry in entries
        if isinstance(entry, dict) and entry.get("special") is True and isinstance(entry.get("content"), str)
    }


def special_names(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """ "bos" -> "<s>" and so on, from tokenizer_config.json, else special_tokens_map.json."""
    names = {}
    for table in (read_json_if_there(folder / "special_tokens_map.json"), settings):
        for name in SPECIAL:
            value = table.get(f"{name}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                names[name] = value
    return names


def find_special_ids(
    vocabulary: Vocabulary, names: Mapping[str, str], config_ids: Mapping[str, Any]
) -> dict[str, int]:
    """Ids named by the tokenizer's own text first, then by config.json, then by the SentencePiece model."""
    by_text = {token.text: i for i, token in enumerate(vocabulary.tokens)}
    ids: dict[str, int] = {}
    for name in SPECIAL:
        candidates = (
            by_text.get(names.get(name, "")),
            config_ids.get(name),
            vocabulary.special_ids.get(name),
        )
        for i in candidates:
            if type(i) is int and 0 <= i < len(vocabulary):
                ids[name] = i
                break
    needed = ("eos",) if vocabulary.is_byte_level else ("unk", "eos")
    missing = [name for name in needed if name not in ids]
    if missing:
        raise CheckpointError(f"{vocabulary.source}: no {' and no '.join(missing)} token")
    return ids


def find_end_of_turn(
    folder: Path, vocabulary: Vocabulary, eos: int, config_ids: Mapping[str, Any]
) -> dict[str, int]:
    """A second token that ends an answer besides eos: `<|im_end|>` (Yi), or what the configs name."""
    listed = read_json_if_there(folder / "generation_config.json").get("eos_token_id")
    by_text = {token.text: i for i, token in enumerate(vocabulary.tokens)}
    candidates = [by_text.get(text) for text in _TURN_ENDS]
    candidates += [config_ids.get("eos"), *(listed if isinstance(listed, list) else [listed])]
    for i in candidates:
        if type(i) is int and 0 <= i < len(vocabulary) and i != eos and vocabulary.tokens[i].kind == CONTROL:
            return {"eot": i}
    return {}


def chat_template_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint's own template, if it has one that readers can take."""
    value = settings.get("chat_template") or read_json_if_there(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(value, list):  # several by name
        entries = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = entries.get("default")
    path = folder / "chat_template.jinja"
    if value is None and path.exists() and path.stat().st_size <= MAX_TEMPLATE:
        value = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if not isinstance(value, str) or not value:
        return None
    if len(value.encode("utf-8", "replace")) > MAX_TEMPLATE or "\0" in value:
        log.info("left out the chat template: longer than %d bytes", MAX_TEMPLATE)
        return None
    return value
