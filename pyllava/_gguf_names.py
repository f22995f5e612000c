"""What the names of GGUF files tell: the quantisation, what is left without it, and the parts of a split model."""

from __future__ import annotations

import re

FIRST_PART = re.compile(r"(?<!-\d{5}-of-\d{5})\.gguf$|-00001-of-\d{5}\.gguf$", re.IGNORECASE)
"""A file that a model can be loaded from: all of it, or the first of several."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_QUANT = re.compile(
    r"(?:^|[-_. ])((?:i?q|tq)_?\d(?:_(?:\d|k|nl|x{0,2}[sml]))*|bf16|fp?16|fp?32|int[48])(?=$|[-_. ])",
    re.IGNORECASE,
)
_SPELLINGS = {"FP16": "F16", "FP32": "F32"}


def spelled(quant: str) -> str:
    """A quantisation as it is compared and shown: ``q_4_k`` and ``Q4_K`` are one."""
    name = re.sub(r"^((?:I?Q|TQ))_(?=\d)", r"\1", quant.strip().upper().replace("-", "_"))
    return _SPELLINGS.get(name, name)


def quant_of(name: str) -> str:
    """The quantisation that the name of a file tells; "" where it tells none."""
    found = _QUANT.findall(_stem(name))
    return spelled(found[-1]) if found else ""


def model_of(name: str) -> str:
    """Equal for the files of one model: `stem_of` without the v of a version, which uploaders write and leave out."""
    return re.sub(r"(?<![a-z])v(?=\d)", "", stem_of(name))


def stem_of(name: str) -> str:
    """The name of a file without its folder and quantisation."""
    stem = _stem(name)
    for found in list(_QUANT.finditer(stem))[-1:]:
        stem = stem[: found.start()] + stem[found.end() :]
    return stem.lower().strip("-_. ")


def is_projector_name(name: str) -> bool:
    return "mmproj" in name.lower()


def parts_of(name: str) -> list[str]:
    """The names of all files of the model whose first one is `name`."""
    found = _PART.search(name)
    if found is None:
        return [name]
    return [_PART.sub(f"-{i:05d}-of-{found[2]}", name) for i in range(1, int(found[2]) + 1)]


def _stem(name: str) -> str:
    return re.sub(r"\.gguf$", "", _PART.sub("", name.rpartition("/")[2]), flags=re.IGNORECASE)
