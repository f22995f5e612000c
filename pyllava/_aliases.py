"""Short names of models on the Hugging Face Hub, and names of repositories as people write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Alias:
    """A model that is published as GGUF files. Sizes are those of the listings, for the quantisation that is fetched by default."""

    repo: str
    files: str
    """Language model and projector."""
    gb: float
    """To fetch, in 10^9 bytes."""
    memory_gb: float
    """With a KV cache of 4096 positions in f16."""
    licence: str
    """Of the weights, as their page or that of the original says it."""
    mmproj_repo: str = ""
    """Where the projector lies, if that is another repository."""


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llava-1.5-7b": Alias(
            "second-state/Llava-v1.5-7B-GGUF",
            "llava-v1.5-7b-Q4_K_M.gguf, llava-v1.5-7b-mmproj-model-f16.gguf",
            *(4.7, 6.9, "Llama 2"),
        ),
        "llava-1.5-13b": Alias(
            "mys/ggml_llava-v1.5-13b",
            "ggml-model-q4_k.gguf, mmproj-model-f16.gguf",
            *(8.5, 12.0, "Llama 2"),
        ),
        "llava-1.6-mistral-7b": Alias(
            "cjpais/llava-1.6-mistral-7b-gguf",
            "llava-v1.6-mistral-7b.Q4_K_M.gguf, mmproj-model-f16.gguf",
            *(5.0, 5.6, "Apache 2.0"),
        ),
        "llava-1.6-vicuna-7b": Alias(
            "cjpais/llava-v1.6-vicuna-7b-gguf",
            "llava-v1.6-vicuna-7b.Q4_K_M.gguf, mmproj-model-f16.gguf",
            *(4.7, 6.9, "Llama 2"),
        ),
        "llava-1.6-vicuna-13b": Alias(
            "cjpais/llava-v1.6-vicuna-13b-gguf",
            "llava-v1.6-vicuna-13b.Q4_K_M.gguf, mmproj-model-f16.gguf",
            *(8.5, 12.0, "Llama 2"),
        ),
        "llava-1.6-34b": Alias(
            "cjpais/llava-v1.6-34B-gguf",
            "llava-v1.6-34b.Q4_K_M.gguf, mmproj-model-f16.gguf",
            *(21.4, 22.6, "Apache 2.0"),
        ),
        "bakllava": Alias(
            "mys/ggml_bakllava-1",
            "ggml-model-q4_k.gguf, mmproj-model-f16.gguf",
            *(5.0, 5.6, "not stated there"),
        ),
        "llava-llama-3-8b": Alias(
            "xtuner/llava-llama-3-8b-v1_1-gguf",
            "llava-llama-3-8b-v1_1-int4.gguf, llava-llama-3-8b-v1_1-mmproj-f16.gguf",
            *(5.5, 6.2, "not stated there"),
        ),
        "llava-phi-3-mini": Alias(
            "xtuner/llava-phi-3-mini-gguf",
            "llava-phi-3-mini-int4.gguf, llava-phi-3-mini-mmproj-f16.gguf",
            *(2.9, 4.6, "not stated there"),
        ),
        "joycaption": Alias(
            "mradermacher/llama-joycaption-beta-one-hf-llava-GGUF",
            "llama-joycaption-beta-one-hf-llava.Q4_K_M.gguf, llama-joycaption-beta-one-llava-mmproj-model-f16.gguf",
            *(5.8, 6.4, "Llama 3.1"),
            mmproj_repo="concedo/llama-joycaption-beta-one-hf-llava-mmproj-gguf",
        ),
        "granite-vision-3.2-2b": Alias(
            "ibm-research/granite-vision-3.2-2b-GGUF",
            "granite-vision-3.2-2b-Q4_K_M.gguf, mmproj-model-f16.gguf",
            *(2.4, 2.8, "Apache 2.0"),
        ),
    }
)
"""In the order of the documentation's table (docs/models.md)."""

_HOSTS = re.compile(r"^(?:https?://)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MOST = 96  # characters of a repository's name


@dataclass(frozen=True)
class Spec:
    """What `REPO[:QUANT]` or `ALIAS[:QUANT]` means."""

    name: str
    """As it was given, without the quantisation."""
    repo: str
    quant: str | None
    mmproj_repo: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.quant.lower()}" if self.quant else self.name


def spec_of(text: str) -> Spec | None:
    """The repository that `text` names; None for what is no such name, or may be a path on this machine."""
    named, _, quant = _HOSTS.sub("", text).rstrip("/").partition(":")
    if not re.fullmatch(r"[\w.-]*", quant, re.ASCII):
        return None
    alias = ALIASES.get(named.lower())
    if alias is not None:
        return Spec(named, alias.repo, quant or None, alias.mmproj_repo)
    if not _REPO.fullmatch(named) or len(named) > _MOST or named.lower().endswith(".gguf"):
        return None
    is_path = not _HOSTS.match(text) and os.path.isdir(named.partition("/")[0])
    return None if is_path else Spec(named, named, quant or None)
