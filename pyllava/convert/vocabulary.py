"""The vocabulary of a language model as GGUF stores it: texts, scores, kinds and special ids.

The rules are those of CONTRACT 5 and 8.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, shown
from .gguf_out import Metadata
from .script import log
from .sentencepiece_model import MAX_PIECES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED_SCORE = -1000.0
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
ROW_MULTIPLE = 64  # transformers rounds a vocabulary up to this many rows
_KEY = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's words, its spelling included


@dataclass(frozen=True)
class Token:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids; those from `n_base` on were added to the trained ones.

    Special tokens may take the white space on their left or right along (ids in `lstrip`, `rstrip`). Byte-level BPE has a
    rule `pre` by which texts are cut, and `merges` "a b" in order of rank.
    """

    source: Path
    tokens: tuple[Token, ...]
    n_base: int
    special_ids: dict[str, int]
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    chat_template: str | None = None
    pre: str | None = None
    merges: tuple[str, ...] = ()
    lstrip: tuple[int, ...] = ()
    rstrip: tuple[int, ...] = ()

    @property
    def is_byte_level(self) -> bool:
        return self.pre is not None

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
            return dataclasses.replace(
                self,
                tokens=self.tokens[:n_vocab],
                special_ids=kept,
                lstrip=tuple(i for i in self.lstrip if i < n_vocab),
                rstrip=tuple(i for i in self.rstrip if i < n_vocab),
            )
        if not pad and not self.is_byte_level:  # whose models have more rows than tokens as a rule
            few = " Most likely added_tokens.json is missing." if n_vocab - len(self) < 20 else ""
            raise CheckpointError(f"{mismatch}{few} Use --pad-vocab to fill up with dummy tokens")
        n_dummy = n_vocab - len(self)
        if n_vocab > MAX_PIECES:
            raise CheckpointError(f"{mismatch} At most {MAX_PIECES} tokens")
        log.info("filled the vocabulary up with %d dummy tokens", n_dummy)
        # UNUSED, so that no text is ever read as one: user-defined dummies would be.
        dummies = tuple(Token(f"<dummy{i:05}>", ADDED_SCORE, UNUSED) for i in range(1, n_dummy + 1))
        if self.is_byte_level:
            dummies = tuple(filler(i) for i in range(len(self), n_vocab))
        return checked(dataclasses.replace(self, tokens=self.tokens + dummies))

    def is_rounded_up(self, n_vocab: int) -> bool:
        """Whether `n_vocab` rows are this vocabulary, rounded up as transformers does when it adds tokens."""
        return n_vocab == -(-len(self) // ROW_MULTIPLE) * ROW_MULTIPLE

    def describe(self, meta: Metadata) -> None:
        """Add the `tokenizer.*` keys."""
        meta.text("tokenizer.ggml.model", "gpt2" if self.is_byte_level else "llama")
        meta.text("tokenizer.ggml.pre", self.pre or "default")
        meta.texts("tokenizer.ggml.tokens", [token.text for token in self.tokens])
        if self.is_byte_level:
            meta.texts("tokenizer.ggml.merges", self.merges)
        else:
            meta.f32s("tokenizer.ggml.scores", [token.score for token in self.tokens])
        meta.i32s("tokenizer.ggml.token_type", [token.kind for token in self.tokens])
        meta.i32s("pyllava.tokens_lstrip", self.lstrip)
        meta.i32s("pyllava.tokens_rstrip", self.rstrip)
        for name, token in self.special_ids.items():
            meta.u32(f"tokenizer.ggml.{_KEY.get(name, name)}_token_id", token)
        meta.flag("tokenizer.ggml.add_bos_token", self.add_bos)
        meta.flag("tokenizer.ggml.add_eos_token", self.add_eos)
        meta.flag("tokenizer.ggml.add_space_prefix", self.add_space_prefix)
        if self.remove_extra_whitespaces:
            meta.flag("tokenizer.ggml.remove_extra_whitespaces", True)
        if self.chat_template:
            meta.text("tokenizer.chat_template", self.chat_template)


def filler(i: int) -> Token:
    """A token for a row that has none, as readers know them."""
    return Token(f"[PAD{i}]", 0.0, UNUSED)


def checked(vocabulary: Vocabulary) -> Vocabulary:
    """What readers demand: no text twice; a piece for each byte, or merges of tokens into tokens (CONTRACT 5, RELIABILITY
    V4, V10, V12).
    """
    ids: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if token.text in ids:
            raise CheckpointError(
                f"{vocabulary.source}: tokens {ids[token.text]} and {i} are both {shown(token.text)}"
            )
        if not token.text or "\0" in token.text or len(token.text.encode("utf-8", "replace")) > 4096:
            raise CheckpointError(f"{vocabulary.source}: token {i} is empty, too long or holds a zero byte")
        ids[token.text] = i
    if vocabulary.is_byte_level:
        _check_merges(vocabulary, ids)
        return vocabulary
    missing = [piece for piece in BYTE_PIECES if piece not in ids]
    if missing:
        raise CheckpointError(
            f"{vocabulary.source}: {len(missing)} byte pieces are missing, first {missing[0]}; "
            f"the vocabulary must be trained with byte_fallback"
        )
    return vocabulary


def _check_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> None:
    for rank, merge in enumerate(vocabulary.merges):
        left, _, right = merge.partition(" ")
        missing = [text for text in (left, right, left + right) if text not in ids]
        if missing or " " in right:
            raise CheckpointError(f"{vocabulary.source}: merge {rank}, {shown(merge)}: no such tokens")
