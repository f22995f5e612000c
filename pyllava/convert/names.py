"""Tensor names: what checkpoints call a tensor, what GGUF calls it, and its shape in terms of the
hyper-parameters. (Language models and towers: `families`.)

Shapes are row-major, one symbol per axis. Language model: V n_vocab, d n_embd, q n_head * head_dim, k
n_head_kv * head_dim, f n_ff. Vision tower: D width, F feed-forward width, P patch_size, T positions, 3
colours. Projector: D in, E out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Rule(NamedTuple):
    """`name` is the GGUF name (or its end, in a block)."""

    name: str
    shape: str
    optional: bool = False


PROJECTOR_PREFIXES = ("model.mm_projector.", "mm_projector.", "model.vision_proj.", "vision_proj.")
HF_PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")
NEWLINE_NAMES = ("model.image_newline", "image_newline")
TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.", "vit.")
LORA_PREFIX = "base_model.model."


def language_prefix(names: Iterable[str]) -> str | None:
    """What stands before `embed_tokens.weight`: `model.` in LLaVA, `model.language_model.` in HF."""
    ends = [name[: -len("embed_tokens.weight")] for name in names if name.endswith("embed_tokens.weight")]
    return min(ends, key=len) if ends else None


def projector_name(name: str) -> str | None:
    """The original LLaVA name (`model.mm_projector.0.weight`, `model.image_newline`) of a tensor, or None."""
    name = name.removeprefix(LORA_PREFIX)
    if name in NEWLINE_NAMES:
        return "model.image_newline"
    for prefix in PROJECTOR_PREFIXES:
        if name.startswith(prefix):
            return "model.mm_projector." + name[len(prefix) :]
    for prefix in HF_PROJECTOR_PREFIXES:
        if name.startswith(prefix):
            end = name[len(prefix) :].replace("linear_1.", "0.").replace("linear_2.", "2.")
            end = end.replace("projector_layernorm.", "clip_layernorm.")
            return "model.mm_projector." + end
    return None


def tower_name(name: str) -> str | None:
    """`vision_model.` and what follows, for a vision tower's tensor in a LLaVA checkpoint, or None."""
    name = name.removeprefix(LORA_PREFIX)
    if not name.startswith(TOWER_PREFIXES):
        return None
    end = re.sub(r"^(model\.)?(vision_tower\.)*(vit\.)?(vision_model\.)?", "", name)
    return "vision_model." + end


def projector_gguf_name(name: str) -> str:
    """`model.mm_projector.*` as the projector file calls it (CONTRACT 8.4)."""
    name = name.replace("model.mm_projector", "mm")
    name = re.sub(r"^mm\.(weight|bias)$", r"mm.0.\1", name)  # the only layer
    name = name.replace("mm.final_linear.", "mm.").replace("mm.clip_layernorm.", "mm.input_norm.")  # ViP's
    return name.replace("mm.mlp.mlp", "mm.model.mlp").replace("mm.peg.peg", "mm.model.peg")


def projector_type(names: Iterable[str]) -> str | None:
    """The kind of a projector, told by its GGUF tensor names; None for what no reader knows."""
    have = set(names)
    if "mm.model.peg.0.weight" in have:
        return "ldpv2"
    if any(name.startswith("mm.model.mb_block.") for name in have):
        return "ldp"
    if {"mm.0.weight", "mm.3.weight"} <= have:
        return "mlp_norm"
    matrices = {name for name in have if name.endswith(".weight")}
    if matrices == {"mm.0.weight"} and "mm.2.bias" not in have:
        return "linear"
    if matrices == {"mm.0.weight", "mm.2.weight"}:
        return "mlp"
    if matrices == {"mm.input_norm.weight", "mm.0.weight", "mm.2.weight"}:
        return "vip"
    return None


def shape_of(rule: Rule, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape a rule demands, given the value of each symbol."""
    return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in rule.shape.split())
