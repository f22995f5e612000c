"""Families of language models: what their checkpoints say of themselves and how their tensors are written.

A family is a row; `FAMILIES` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .names import LLAMA, LLAMA_BLOCK, QWEN2_BLOCK, Rule

# What transformers assumes for a key that a nested text_config leaves out (LlamaConfig, MistralConfig, Qwen2Config).
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN2 = {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}


@dataclass(frozen=True)
class Family:
    """`architecture`: of the GGUF file, and what its keys begin with. `kinds` matches the model_type and the
    architectures of a config.json, in lower case with spaces between. `defaults`: by model_type, "" for all others.
    `paired`: the file wants the rows of q and k in the order in which pairs (2i, 2i + 1) are rotated.
    """

    architecture: str
    kinds: re.Pattern[str]
    defaults: Mapping[str, Mapping[str, Any]]
    ends: Mapping[str, Rule]
    block: Mapping[str, Rule]
    paired: bool

    def defaults_of(self, model_type: object) -> Mapping[str, Any]:
        return next((table for kind, table in self.defaults.items() if kind == model_type), self.defaults[""])


LLAMA_FAMILY = Family(
    "llama",
    re.compile(r"|(?!.*(qwen|phi|mpt|gemma|mixtral|stablelm)).*(llama|llava|mistral|yi).*", re.DOTALL),
    {"": _LLAMA, "mistral": _MISTRAL},
    LLAMA,
    LLAMA_BLOCK,
    paired=True,
)
QWEN2_FAMILY = Family(
    "qwen2",
    re.compile(r"(.* )?(qwen2|qwen2forcausallm|llavaqwenforcausallm)( .*)?", re.DOTALL),
    {"": _QWEN2},
    LLAMA,
    QWEN2_BLOCK,
    paired=False,
)
FAMILIES = (LLAMA_FAMILY, QWEN2_FAMILY)


def family_of(kinds: str) -> Family | None:
    """The family of a config.json with such `Family.kinds`."""
    return next((family for family in FAMILIES if family.kinds.fullmatch(kinds)), None)
