"""Families of language models and of vision towers: what their checkpoints say of themselves, and how their
tensors are called and written. A family is a row; `FAMILIES` lists those of language models.

Shapes of rules are explained in `names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .names import Rule


@dataclass(frozen=True)
class Family:
    """`architecture`: of the GGUF file, and the prefix of its keys. `kinds` matches the model_type and the
    architectures of a config.json, in lower case with spaces between. `defaults`: by model_type, "" for all
    others. `ends`, `block`: the tensors outside and inside of the layers, as Hugging Face calls them after
    the prefix (`model.`, `language_model.model.`, ...). `paired`: the file wants the rows of q and k in the
    order in which pairs (2i, 2i + 1) are rotated. `scales`: keys of the file, and the settings that give them.
    `fused`: tensors of a layer whose rows are those of others of `block`, one after the other.
    """

    architecture: str
    kinds: re.Pattern[str]
    defaults: Mapping[str, Mapping[str, Any]]
    ends: Mapping[str, Rule]
    block: Mapping[str, Rule]
    paired: bool
    scales: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def defaults_of(self, model_type: object) -> Mapping[str, Any]:
        return next((table for kind, table in self.defaults.items() if kind == model_type), self.defaults[""])


@dataclass(frozen=True)
class Tower:
    """`kind`: the model_type of its config. `defaults`: what transformers assumes for a key that is left out.
    `published`: settings by the last part of a model's name. `activations`: what readers of the file compute
    for a hidden_act. `ends`, `block`: as in Family, after `vision_model.` or nothing. `unused`: other tensors
    of such a folder, which LLaVA does not need.
    """

    kind: str
    activations: Mapping[str, str]
    defaults: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Any]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    ends: Mapping[str, Rule]
    block: Mapping[str, Rule]
    unused: re.Pattern[str]


# --- language models ---

# What transformers assumes for a key that a nested text_config leaves out: LlamaConfig, MistralConfig,
# Qwen2Config, Phi3Config.
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
_PHI3 = {
    **_LLAMA,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

_ENDS = {
    "embed_tokens.weight": Rule("token_embd.weight", "V d"),
    "norm.weight": Rule("output_norm.weight", "d"),
}
OUTPUT = Rule(
    "output.weight", "V d"
)  # of all families; checkpoints call it lm_head.weight, under several prefixes
_LLAMA_BLOCK = {
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
_QWEN2_BLOCK = {
    name: rule._replace(optional=False)
    for name, rule in _LLAMA_BLOCK.items()
    if name != "self_attn.o_proj.bias"
}
# LLaMA in Meta's own layout (consolidated.00.pth): no prefix, q and k in the order that GGUF wants.
META_ENDS = {"tok_embeddings.weight": _ENDS["embed_tokens.weight"], "norm.weight": _ENDS["norm.weight"]}
META_BLOCK = {
    "attention_norm.weight": _LLAMA_BLOCK["input_layernorm.weight"],
    "attention.wq.weight": _LLAMA_BLOCK["self_attn.q_proj.weight"],
    "attention.wk.weight": _LLAMA_BLOCK["self_attn.k_proj.weight"],
    "attention.wv.weight": _LLAMA_BLOCK["self_attn.v_proj.weight"],
    "attention.wo.weight": _LLAMA_BLOCK["self_attn.o_proj.weight"],
    "ffn_norm.weight": _LLAMA_BLOCK["post_attention_layernorm.weight"],
    "feed_forward.w1.weight": _LLAMA_BLOCK["mlp.gate_proj.weight"],
    "feed_forward.w3.weight": _LLAMA_BLOCK["mlp.up_proj.weight"],
    "feed_forward.w2.weight": _LLAMA_BLOCK["mlp.down_proj.weight"],
}
# Tables that every language model can compute for itself.
DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs(\.weight)?)")

LLAMA = Family(
    "llama",
    re.compile(
        r"|(?!.*(qwen|phi|granite|mpt|gemma|mixtral|stablelm)).*(llama|llava|mistral|yi).*", re.DOTALL
    ),
    {"": _LLAMA, "mistral": _MISTRAL},
    _ENDS,
    _LLAMA_BLOCK,
    paired=True,
)
QWEN2 = Family(
    "qwen2",
    re.compile(r"(.* )?(qwen2|qwen2forcausallm|llavaqwenforcausallm)( .*)?", re.DOTALL),
    {"": _QWEN2},
    _ENDS,
    _QWEN2_BLOCK,
    paired=False,
)
_GRANITE_SCALES = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GRANITE = Family(
    "granite",
    re.compile(r"(.* )?(granite|graniteforcausallm)( .*)?", re.DOTALL),
    {"": _LLAMA | dict.fromkeys(_GRANITE_SCALES.values(), 1.0)},
    _ENDS,
    {name: rule for name, rule in _LLAMA_BLOCK.items() if not rule.optional},
    paired=True,
    scales=_GRANITE_SCALES,
)
# Cut into Llama's matrices, it is a Llama: the same network, and a file that more programs read.
PHI3 = Family(
    "llama",
    re.compile(r"(.* )?(phi3|phi3forcausallm)( .*)?", re.DOTALL),
    {"": _PHI3},
    _ENDS,
    {name: rule for name, rule in _LLAMA_BLOCK.items() if not rule.optional},
    paired=True,
    fused={
        "self_attn.qkv_proj.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    },
)
FAMILIES = (LLAMA, QWEN2, GRANITE, PHI3)


def family_of(kinds: str) -> Family | None:
    """The family of a config.json with such `Family.kinds`."""
    return next((family for family in FAMILIES if family.kinds.fullmatch(kinds)), None)


# --- vision towers ---

_CLIP_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP_L = {
    **_CLIP_B,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# ffn_down is fc1: the names of the projector files in the field are swapped (CONTRACT 1.3), and readers
# tell by shape.
_TOWER_BLOCK = {
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
_PATCHES = {
    "embeddings.patch_embedding.weight": Rule("v.patch_embd.weight", "D 3 P P"),
    "embeddings.position_embedding.weight": Rule("v.position_embd.weight", "T D"),
}
# The last norm must not be written: readers would apply it (CONTRACT 1.4).
_TOWER_UNUSED = re.compile(
    r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|logit_bias"
    r"|(vision_model\.)?(post_layernorm\..*|head\..*|embeddings\.position_ids)"
)
CLIP = Tower(
    "clip_vision_model",
    activations={"quick_gelu": "quick_gelu", "gelu": "gelu", "silu": "silu"},
    defaults=_CLIP_B,  # CLIPVisionConfig
    published={
        "clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
        "clip-vit-large-patch14": _CLIP_L,
        "clip-vit-base-patch32": _CLIP_B,
        "clip-vit-base-patch16": {**_CLIP_B, "patch_size": 16},
    },
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    ends={
        "embeddings.class_embedding": Rule("v.class_embd", "D"),
        **_PATCHES,
        "embeddings.patch_embedding.bias": Rule("v.patch_embd.bias", "D", optional=True),
        "pre_layrnorm.weight": Rule("v.pre_ln.weight", "D"),
        "pre_layrnorm.bias": Rule("v.pre_ln.bias", "D"),
    },
    block=_TOWER_BLOCK,
    unused=_TOWER_UNUSED,
)
_SIGLIP_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 0,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_SO400M = {
    **_SIGLIP_B,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# No class token and no norm before the first layer; by that, readers tell it from CLIP.
SIGLIP = Tower(
    "siglip_vision_model",
    activations={"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"},
    defaults=_SIGLIP_B,  # SiglipVisionConfig
    published={"siglip-so400m-patch14-384": _SIGLIP_SO400M},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    ends={**_PATCHES, "embeddings.patch_embedding.bias": Rule("v.patch_embd.bias", "D")},
    block=_TOWER_BLOCK,
    unused=_TOWER_UNUSED,
)
TOWERS = (CLIP, SIGLIP)


def tower_of(kind: object) -> Tower | None:
    """The family of towers with this model_type; CLIP where there is none."""
    return CLIP if kind is None else next((tower for tower in TOWERS if tower.kind == kind), None)
