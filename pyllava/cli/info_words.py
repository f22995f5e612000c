"""What a GGUF file is, in a sentence, and whether it fits those beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._facts import facts_of
from .._plain import plain

if TYPE_CHECKING:
    from ..gguf import GgufFile

_FAMILIES = {
    "llama": "the LLaMA family (Vicuna, Mistral, Yi, Phi-3 and Llama-3 among them)",
    "qwen2": "the Qwen2 family",
    "granite": "the Granite family",
}
_PROJECTORS = {
    "mlp": "an MLP (LLaVA-1.5 and later)",
    "vip": "ViP-LLaVA's MLP behind a norm",
    "linear": "one matrix (the first LLaVA)",
    "mlp_norm": "Yi-VL's MLP with norms",
    "ldp": "MobileVLM's convolutions",
    "ldpv2": "MobileVLM V2's convolutions",
}
_BESIDE = 8  # files in the folder that are looked at


def sentences(file: GgufFile, path: str, model: Mapping[str, Any]) -> list[str]:
    """`model`: the facts that ``info`` shows of the file at `path`."""
    if model["kind"] == "projector":
        return [_projector(file.metadata, model), *_beside(path, "language model", model.get("output width"))]
    family = _FAMILIES.get(model["architecture"])
    if family is None:
        return [f"no model that this version runs: architecture {plain(model['architecture'])[:80]}"]
    return [
        f"a language model of {family}; it sees pictures through a projector of its width, {model.get('width')}",
        *_beside(path, "projector", model.get("width")),
    ]


def _projector(metadata: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    side = model.get("image size")
    kind = str(model["projector"]).split()[0]
    tower = "SigLIP" if model["tower"] == "siglip" else "CLIP"
    aspect = str(metadata.get("clip.vision.image_aspect_ratio", ""))
    if model.get("merge") == "spatial_unpad":
        seen = f"whole and in tiles of {side} x {side}"
    elif tower == "SigLIP" and aspect != "pad":
        seen = f"distorted to {side} x {side}"
    else:
        seen = f"padded to a square of {side} x {side}"
    return (
        f"a tower of the kind {tower} that sees pictures {seen}, and {_PROJECTORS.get(kind, plain(kind)[:80])} "
        f"for language models of width {model.get('output width')}"
    )


def _beside(path: str, kind: str, width: object) -> Iterator[str]:
    """Whether the models of the other kind in the same folder fit."""
    from ..errors import PyllavaError
    from ..gguf import GgufFile

    here = Path(path)
    names = sorted(os.listdir(here.parent or "."))
    others = [name for name in names if name.lower().endswith(".gguf") and name != here.name]
    for name in others[:_BESIDE]:
        try:
            found = facts_of(GgufFile(here.parent / name))
        except (PyllavaError, OSError, ValueError):  # it is not this file that was asked about
            continue
        if found["kind"] != kind:
            continue
        other = found.get("width" if kind == "language model" else "output width")
        if other == width:
            yield f"{plain(name)} beside it fits"
        else:
            yield f"{plain(name)} beside it does not fit: its width is {other}, this one's {width}"
