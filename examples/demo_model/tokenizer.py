"""The tokenizer: a SentencePiece BPE model with Llama's settings, trained on the demo's own sentences."""

from __future__ import annotations

import random
from pathlib import Path

import sentencepiece

from . import scenes

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
N_VOCAB = 1024


def sentences(seed: int = 0, count: int = 6000) -> list[str]:
    """Text like that of training; a digit before a question stands for the newline of the prompt."""
    rng = random.Random(seed)
    lines = [SYSTEM] * 50
    for _ in range(count):
        scene = scenes.random_scene(rng)
        for kind in scenes.KINDS:
            question = scenes.ask(scene, kind, rng)
            if question is not None:
                text = question.text if rng.random() < 0.8 else question.text.lower()
                lines.append(f"{rng.choice(('1', ' '))}{text} ASSISTANT: {question.answer}")
    return lines + [f"the word {w} {w}." for w in scenes.WORDS for _ in range(200)]


def train(path: Path) -> None:
    """Writes `path` (a tokenizer.model)."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_writer=file,
            model_type="bpe",
            vocab_size=N_VOCAB,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
