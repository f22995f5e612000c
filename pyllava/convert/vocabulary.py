"""The vocabulary of a language model as GGUF stores it: texts, scores, kinds and special ids.

Two sources: `tokenizer.model` (SentencePiece), and `tokenizer.json` where it holds the same kind of
vocabulary in Hugging Face's form. The rules are those of CONTRACT 5 and 8.5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.json_file import read_json, read_json_if_there
from .errors import CheckpointError, shown
from .gguf_out import Metadata
from .script import log
from .sentencepiece_model import BPE, MAX_PIECES, read_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED_SCORE = -1000.0
MAX_TEMPLATE = 1 << 20
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEY = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's words, its spelling included
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CONTROL_LIKE = re.compile(r"<\|[^<>|]+\|>")
# What LLaVA's training and the Hugging Face layout add for themselves: never read from a user's words.
_PLACEHOLDERS = frozenset(("<image>", "<pad>", "<im_start>", "<im_end>", "<im_patch>"))
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
ROW_MULTIPLE = 64  # transformers rounds a vocabulary up to this many rows


@dataclass(frozen=True)
class Token:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids; those from `n_base` on were added to the trained ones."""

    source: Path
    tokens: tuple[Token, ...]
    n_base: int
    special_ids: dict[str, int]
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    chat_template: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def fitted(self, n_vocab: int, *, pad: bool, drop_added: bool) -> Vocabulary:
        """The vocabulary with exactly `n_vocab` tokens, one per row of the token embeddings."""
        if len(self) == n_vocab:
            return self
        mismatch = f"Vocab size mismatch (model has {n_vocab}, but {self.source} has {len(self)})."
        if len(self) > n_vocab:
            names = ", ".join(token.text for token in self.tokens[n_vocab:][:8])
            if n_vocab < self.n_base:
                raise CheckpointError(
                    f"{mismatch} {self.n_base} of them are trained pieces: wrong tokenizer?"
                )
            if not drop_added:
                raise CheckpointError(f"{mismatch} Use --skip-unknown to leave out the added {shown(names)}")
            log.info("left out %d added tokens that have no row in the model: %s", len(self) - n_vocab, names)
            kept = {name: token for name, token in self.special_ids.items() if token < n_vocab}
            return dataclasses.replace(self, tokens=self.tokens[:n_vocab], special_ids=kept)
        if not pad:
            few = " Most likely added_tokens.json is missing." if n_vocab - len(self) < 20 else ""
            raise CheckpointError(f"{mismatch}{few} Use --pad-vocab to fill up with dummy tokens")
        n_dummy = n_vocab - len(self)
        if n_vocab > MAX_PIECES:
            raise CheckpointError(f"{mismatch} At most {MAX_PIECES} tokens")
        log.info("filled the vocabulary up with %d dummy tokens", n_dummy)
        # UNUSED, so that no text is ever read as one: user-defined dummies would be.
        dummies = tuple(Token(f"<dummy{i:05}>", ADDED_SCORE, UNUSED) for i in range(1, n_dummy + 1))
        return _checked(dataclasses.replace(self, tokens=self.tokens + dummies))

    def is_rounded_up(self, n_vocab: int) -> bool:
        """Whether `n_vocab` rows are this vocabulary, rounded up as transformers does when it adds tokens."""
        return n_vocab == -(-len(self) // ROW_MULTIPLE) * ROW_MULTIPLE

    def describe(self, meta: Metadata) -> None:
        """Add the `tokenizer.*` keys."""
        meta.text("tokenizer.ggml.model", "llama")
        meta.text("tokenizer.ggml.pre", "default")
        meta.texts("tokenizer.ggml.tokens", [token.text for token in self.tokens])
        meta.f32s("tokenizer.ggml.scores", [token.score for token in self.tokens])
        meta.i32s("tokenizer.ggml.token_type", [token.kind for token in self.tokens])
        for name, token in self.special_ids.items():
            meta.u32(f"tokenizer.ggml.{_KEY.get(name, name)}_token_id", token)
        meta.flag("tokenizer.ggml.add_bos_token", self.add_bos)
        meta.flag("tokenizer.ggml.add_eos_token", self.add_eos)
        meta.flag("tokenizer.ggml.add_space_prefix", self.add_space_prefix)
        if self.remove_extra_whitespaces:
            meta.flag("tokenizer.ggml.remove_extra_whitespaces", True)
        if self.chat_template:
            meta.text("tokenizer.chat_template", self.chat_template)


def read_vocabulary(folder: Path, kinds: Sequence[str], config_ids: Mapping[str, Any]) -> Vocabulary:
    """The first of `kinds` ("spm", "hfft") that `folder` holds; `config_ids`: the ids in config.json."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    names = _special_names(folder, settings)
    for kind in kinds:
        path = folder / {"spm": "tokenizer.model", "hfft": "tokenizer.json"}[kind]
        if path.exists():
            vocabulary = _from_spm(path, settings, names) if kind == "spm" else _from_hfft(path, names)
            break
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer.model or tokenizer.json of the kinds {','.join(kinds)}"
        )
    ids = _special_ids(vocabulary, names, config_ids)
    ids |= _end_of_turn(folder, vocabulary, ids["eos"], config_ids)
    add_bos = settings.get("add_bos_token")
    add_eos = settings.get("add_eos_token")
    return dataclasses.replace(
        _checked(vocabulary),
        special_ids=ids,
        add_bos=add_bos if isinstance(add_bos, bool) else "bos" in ids,
        add_eos=add_eos if isinstance(add_eos, bool) else False,
        chat_template=_chat_template(folder, settings),
    )


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    """What readers demand: no text twice, a piece for each byte (CONTRACT 5, RELIABILITY V4, V12)."""
    ids: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if token.text in ids:
            raise CheckpointError(
                f"{vocabulary.source}: tokens {ids[token.text]} and {i} are both {shown(token.text)}"
            )
        if not token.text or "\0" in token.text or len(token.text.encode("utf-8", "replace")) > 4096:
            raise CheckpointError(f"{vocabulary.source}: token {i} is empty, too long or holds a zero byte")
        ids[token.text] = i
    missing = [piece for piece in _BYTE_PIECES if piece not in ids]
    if missing:
        raise CheckpointError(
            f"{vocabulary.source}: {len(missing)} byte pieces are missing, first {missing[0]}; "
            f"the vocabulary must be trained with byte_fallback"
        )
    return vocabulary


# SentencePiece


def _from_spm(path: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> Vocabulary:
    model = read_sentencepiece(path)
    if model.model_type != BPE:
        raise CheckpointError(
            f"{path}: not a BPE model (type {model.model_type}); GGUF's tokenizer merges pairs by score"
        )
    if model.normalizes or model.remove_extra_whitespaces:
        log.info("%s normalises its text before the pieces; GGUF readers do not", path.name)
    special = _special_texts(settings)
    base = [Token(piece.text, piece.score, _kind(piece.text, piece.kind, special)) for piece in model.pieces]
    added = _added_tokens(
        path.parent, settings, len(base), [token.text for token in base], set(names.values())
    )
    ids = {name: i for name, i in model.special_ids.items() if 0 <= i < len(base)}
    return Vocabulary(
        path,
        (*base, *added),
        len(base),
        ids,
        add_space_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
    )


def _kind(text: str, kind: int, special: set[str]) -> int:
    """User-defined pieces stay user-defined, but `<|im_start|>` and its like (Yi), and what the tokenizer's
    settings call special, are control tokens: found in a template as one id, as HF does, and never read from
    a user's text.
    """
    if text in special:
        return CONTROL if kind in (NORMAL, USER_DEFINED) else kind
    return CONTROL if kind == USER_DEFINED and _CONTROL_LIKE.fullmatch(text) else kind


def _special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts that added_tokens_decoder calls special."""
    decoder = settings.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    return {
        entry["content"]
        for entry in entries
        if isinstance(entry, dict) and entry.get("special") is True and isinstance(entry.get("content"), str)
    }


def _added_tokens(
    folder: Path, settings: Mapping[str, Any], n_base: int, base: Sequence[str], special: set[str]
) -> list[Token]:
    """added_tokens.json and added_tokens_decoder of tokenizer_config.json: ids from `n_base` on, no gap."""
    texts: dict[int, str] = {}
    for text, i in read_json_if_there(folder / "added_tokens.json").items():
        _note(texts, folder / "added_tokens.json", i, text)
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and key.isdecimal() and len(key) < 10:
            _note(texts, folder / "tokenizer_config.json", int(key), entry.get("content"))
    special = special | _special_texts(settings)
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
    return [_added(texts[i], texts[i] in special) for i in wanted]


def _note(texts: dict[int, str], path: Path, i: Any, text: Any) -> None:
    if type(i) is not int or not 0 <= i < MAX_PIECES or not isinstance(text, str):
        raise CheckpointError(f"{path}: added token {shown(text)} with id {shown(i)}")
    if texts.setdefault(i, text) != text:
        raise CheckpointError(f"{path}: id {i} is both {shown(texts[i])} and {shown(text)}")


def _added(text: str, special: bool) -> Token:
    special = special or text in _PLACEHOLDERS or _CONTROL_LIKE.fullmatch(text) is not None
    kind = CONTROL if special else USER_DEFINED
    return Token(text, ADDED_SCORE, kind)


# tokenizer.json


def _from_hfft(path: Path, names: Mapping[str, str]) -> Vocabulary:
    """A SentencePiece-style BPE in Hugging Face's form. A piece's score is minus the rank of the merge that
    makes it, so that merging by score does what merging by rank does.
    """
    table = read_json(path)
    model = table.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: holds no vocabulary")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") is not True:
        raise CheckpointError(
            f"{path}: not a SentencePiece-style vocabulary (BPE with byte_fallback); need tokenizer.model"
        )
    ranks = _merge_ranks(path, model.get("merges"))
    by_id: dict[int, Token] = {}
    unknown = model.get("unk_token")
    for text, i in model["vocab"].items():
        kind = UNKNOWN if text == unknown else BYTE if text in _BYTE_PIECES else NORMAL
        _place(by_id, path, i, Token(text, -float(ranks.get(text, len(ranks))), kind))
    n_base = len(by_id)
    for entry in table.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: an added token without content")
        i, text = entry.get("id"), entry["content"]
        token = _added(text, entry.get("special") is True or text in names.values())
        if type(i) is int and i in by_id and by_id[i].text == text:
            token = Token(text, by_id[i].score, UNKNOWN if by_id[i].kind == UNKNOWN else token.kind)
            del by_id[i]
        _place(by_id, path, i, token)
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(f"{path}: {len(by_id)} tokens whose ids leave gaps")
    tokens = tuple(by_id[i] for i in range(len(by_id)))
    kinds = [token.kind for token in tokens]
    ids = {"unk": kinds.index(UNKNOWN)} if UNKNOWN in kinds else {}
    return Vocabulary(path, tokens, n_base, ids, add_space_prefix=_adds_prefix(table))


def _place(by_id: dict[int, Token], path: Path, i: Any, token: Token) -> None:
    if type(i) is not int or not 0 <= i < MAX_PIECES or i in by_id:
        raise CheckpointError(f"{path}: token {shown(token.text)} with id {shown(i)}")
    by_id[i] = token


def _merge_ranks(path: Path, merges: Any) -> dict[str, int]:
    """Merged text -> rank of the first merge that makes it. A merge is "a b" or ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: holds no merges")
    ranks: dict[str, int] = {}
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{path}: merge {shown(merge)} is not a pair")
        ranks.setdefault(parts[0] + parts[1], len(ranks))
    return ranks


def _adds_prefix(table: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text: a Prepend normalizer or a Metaspace pre-tokenizer says so."""
    text = str(table.get("normalizer"))
    pre = table.get("pre_tokenizer")
    metaspace = isinstance(pre, dict) and pre.get("type") == "Metaspace"
    if metaspace and isinstance(pre, dict):
        return pre.get("prepend_scheme") != "never" and pre.get("add_prefix_space") is not False
    return "Prepend" in text


# Special tokens and the template


def _special_names(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """ "bos" -> "<s>" and so on, from tokenizer_config.json, else special_tokens_map.json."""
    names = {}
    for table in (read_json_if_there(folder / "special_tokens_map.json"), settings):
        for name in SPECIAL:
            value = table.get(f"{name}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                names[name] = value
    return names


def _special_ids(
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
    missing = [name for name in ("unk", "eos") if name not in ids]
    if missing:
        raise CheckpointError(f"{vocabulary.source}: no {' and no '.join(missing)} token")
    return ids


def _end_of_turn(
    folder: Path, vocabulary: Vocabulary, eos: int, config_ids: Mapping[str, Any]
) -> dict[str, int]:
    """A second token that ends an answer, where eos is another: `<|im_end|>` (Yi), or what the configs name."""
    listed = read_json_if_there(folder / "generation_config.json").get("eos_token_id")
    by_text = {token.text: i for i, token in enumerate(vocabulary.tokens)}
    candidates = [by_text.get(text) for text in _TURN_ENDS]
    candidates += [config_ids.get("eos"), *(listed if isinstance(listed, list) else [listed])]
    for i in candidates:
        if type(i) is int and 0 <= i < len(vocabulary) and i != eos and vocabulary.tokens[i].kind == CONTROL:
            return {"eot": i}
    return {}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint's own template, if it has one that readers can take."""
    value = settings.get("chat_template") or read_json_if_there(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(value, list):  # several by name
        entries = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = entries.get("default")
    path = folder / "chat_template.jinja"
    if value is None and path.exists() and path.stat().st_size <= MAX_TEMPLATE:
        value = path.read_text(encoding="utf-8", errors="replace")
    if not isinstance(value, str) or not value:
        return None
    if len(value.encode("utf-8", "replace")) > MAX_TEMPLATE or "\0" in value:
        log.info("left out the chat template: longer than %d bytes", MAX_TEMPLATE)
        return None
    return value
