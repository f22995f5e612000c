"""Models of LLaVA's wider family that cannot be converted, each with the reason, told by their config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import CheckpointError, shown

# A kind (model_type, or a name among the architectures) in lower case, the model, and what of it is not here.
_UNSUPPORTED = tuple(
    (re.compile(kind), name, reason)
    for kind, name, reason in (
        (
            "llava_qwen2|fast_?vlm.*",  # llava-qwen2, with a hyphen, is nanoLLaVA
            "FastVLM",
            "its vision tower is FastViTHD, which is neither CLIP nor SigLIP",
        ),
        (
            r"llava_?onevision_?(1_5|2).*",
            "LLaVA-OneVision 1.5 and 2",
            "their vision tower takes pictures at their own resolution, and is neither CLIP nor SigLIP",
        ),
        (
            "granite_?4_?vision.*",
            "Granite 4 Vision",
            "features of its vision tower enter several layers of the language model, not its input alone",
        ),
        (
            "(bunny-?)?phi|phi-msft|(bunny)?phiforcausallm|imp|impforcausallm",
            "Phi-2",
            "its layers compute attention and feed-forward network side by side, after one norm",
        ),
        (
            ".*stablelm.*",
            "StableLM",
            "it has layer norms with a bias, and positions turn a part of each head",
        ),
        (".*gemma.*", "Gemma", "its norms and its activation are other ones than LLaMA's"),
        ("mpt|mptforcausallm|llava_?mpt.*", "MPT", "its attention knows positions by a bias (ALiBi)"),
    )
)


def check_supported(where: str, table: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a config.json, or a part of one, of such a model."""
    for kind in _kinds(table):
        for pattern, name, reason in _UNSUPPORTED:
            if pattern.fullmatch(kind.lower()):
                raise CheckpointError(f"{where}: {shown(kind)}, {name}, is not supported: {reason}")


def _kinds(table: Mapping[str, Any]) -> Iterator[str]:
    """Of the model and of its language model."""
    for part in (table, table.get("text_config")):
        if isinstance(part, dict):
            names = part.get("architectures")
            kinds = [part.get("model_type"), *(names if isinstance(names, list) else ())]
            yield from (kind for kind in kinds if isinstance(kind, str))
