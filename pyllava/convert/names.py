"""Tensor names: what checkpoints call a tensor, what GGUF calls it, and its shape in terms of the
hyper-parameters.

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


# Language model, Hugging Face layout, after the prefix (`model.`, `language_model.model.`, ...).
LLAMA = {
    "embed_tokens.weight": Rule("token_embd.weight", "V d"),
    "norm.weight": Rule("output_norm.weight", "d"),
}
LLAMA_HEAD = Rule("output.weight", "V d")
LLAMA_BLOCK = {
    "input_layernorm.weight": Rule("attn_norm.weight", "d"),
    "self_attn.q_proj.weight": Rule("attn_q.weight", "q d"),
    "self_attn.k_proj.weight": Rule("attn_k.weight", "k d"),
    "self_attn.v_proj.weight": Rule("attn_v.weight", "k d"),
    "self_attn.o_proj.weight": Rule("attn_output.weight", "d q"),
    "post_attention_layernorm.weight": Rule("ffn_norm.weight", "d"),
    "mlp.gate_proj.weight": Rule("ffn_gate.weight", "f d"),
    "mlp.up_proj.weight": Rule("ffn_up.weight", "f d"),
    "mlp.down_proj.weight": Rule("ffn_down.weight", "d f"),
    "self_attn.q_proj.bias": Rule("attn_q.bias", "q", optional=True),
    "self_attn.k_proj.bias": Rule("attn_k.bias", "k", optional=True),
    "self_attn.v_proj.bias": Rule("attn_v.bias", "k", optional=True),
    "self_attn.o_proj.bias": Rule("attn_output.bias", "d", optional=True),
}
QWEN2_BLOCK = {
    name: rule._replace(optional=False)
    for name, rule in LLAMA_BLOCK.items()
    if name != "self_attn.o_proj.bias"
}
# The same in Meta's own layout (consolidated.00.pth): no prefix, q and k in the order that GGUF wants.
META = {"tok_embeddings.weight": LLAMA["embed_tokens.weight"], "norm.weight": LLAMA["norm.weight"]}
META_BLOCK = {
    "attention_norm.weight": LLAMA_BLOCK["input_layernorm.weight"],
    "attention.wq.weight": LLAMA_BLOCK["self_attn.q_proj.weight"],
    "attention.wk.weight": LLAMA_BLOCK["self_attn.k_proj.weight"],
    "attention.wv.weight": LLAMA_BLOCK["self_attn.v_proj.weight"],
    "attention.wo.weight": LLAMA_BLOCK["self_attn.o_proj.weight"],
    "ffn_norm.weight": LLAMA_BLOCK["post_attention_layernorm.weight"],
    "feed_forward.w1.weight": LLAMA_BLOCK["mlp.gate_proj.weight"],
    "feed_forward.w3.weight": LLAMA_BLOCK["mlp.up_proj.weight"],
    "feed_forward.w2.weight": LLAMA_BLOCK["mlp.down_proj.weight"],
}
# Tables that every LLaMA can compute for itself.
LLAMA_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs(\.weight)?)")

# CLIP vision tower, after the prefix (`vision_model.` or nothing). ffn_down is fc1: the names of the
# projector files in the field are swapped (CONTRACT 1.3), and readers tell by shape.
CLIP = {
    "embeddings.class_embedding": Rule("v.class_embd", "D", optional=True),
    "embeddings.patch_embedding.weight": Rule("v.patch_embd.weight", "D 3 P P"),
    "embeddings.patch_embedding.bias": Rule("v.patch_embd.bias", "D", optional=True),
    "embeddings.position_embedding.weight": Rule("v.position_embd.weight", "T D"),
    "pre_layrnorm.weight": Rule("v.pre_ln.weight", "D", optional=True),
    "pre_layrnorm.bias": Rule("v.pre_ln.bias", "D", optional=True),
}
CLIP_BLOCK = {
    **{
        f"self_attn.{hf}.{end}": Rule(f"attn_{name}.{end}", shape)
        for hf, name in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))
        for end, shape in (("weight", "D D"), ("bias", "D"))
    },
    **{
        f"{hf}.{end}": Rule(f"{name}.{end}", "D")
        for hf, name in (("layer_norm1", "ln1"), ("layer_norm2", "ln2"))
        for end in ("weight", "bias")
    },
    "mlp.fc1.weight": Rule("ffn_down.weight", "F D"),
    "mlp.fc1.bias": Rule("ffn_down.bias", "F"),
    "mlp.fc2.weight": Rule("ffn_up.weight", "D F"),
    "mlp.fc2.bias": Rule("ffn_up.bias", "D"),
}
# In a CLIP folder but of no use to LLaVA. The last norm must not be written: readers would apply it (CONTRACT
# 1.4).
CLIP_UNUSED = re.compile(
    r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias"
    r"|(vision_model\.)?(post_layernorm\..*|head\..*|embeddings\.position_ids)"
)

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
    if {"mm.0.weight", "mm.2.weight"} <= have and len([n for n in have if n.endswith(".weight")]) == 2:
        return "mlp"
    return None


def shape_of(rule: Rule, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape a rule demands, given the value of each symbol."""
    return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in rule.shape.split())
