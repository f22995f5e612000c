"""LLaVA-1.5 and 1.6 in PyTorch: CLIP vision tower, two-layer projector, LLaMA. Names as in the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    image_size: int = 112
    patch_size: int = 14
    hidden_size: int = 192
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    layer_norm_eps: float = 1e-5

    @property
    def n_patch(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def heads(x: Tensor, count: int) -> Tensor:
    """[batch, tokens, width] -> [batch, heads, tokens, head_dim]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


Rope = tuple[Tensor, Tensor]  # cos and sin, [batch, 1, tokens, head_dim]
KV = tuple[Tensor, Tensor]  # keys and values of a layer, [batch, heads, tokens, head_dim]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as in the paper, `mask` added to the scores. Trains faster than the fused kernel on a CPU."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


# --- vision tower (Hugging Face CLIPVisionModel) ----------------------------------------------------------


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.n_head = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x), self.n_head) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v))


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, with the factors moved into the small tensors
        x = F.silu(F.linear(x, self.fc1.weight * 1.702, self.fc1.bias * 1.702))
        return F.linear(x, self.fc2.weight / 1.702, self.fc2.bias)


class VisionLayer(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = VisionMLP(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.patch_size = c.patch_size
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.patch_embedding = nn.Linear(3 * c.patch_size**2, c.hidden_size, bias=False)  # a convolution
        self.position_embedding = nn.Embedding(c.n_patch + 1, c.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        x = self.patch_embedding(patches)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, size, size] -> [batch, patches, width]: hidden_states[-2] without the class token."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:-1]:  # type: ignore[index]
            x = layer(x)
        return x[:, 1:]


# --- language model (Hugging Face LlamaForCausalLM) -------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.n_head, self.n_head_kv = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.n_head_kv * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.n_head_kv * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        q = rotate(heads(self.q_proj(x), self.n_head), *rope)
        k = rotate(heads(self.k_proj(x), self.n_head_kv), *rope)
        v = heads(self.v_proj(x), self.n_head_kv)
        q, k, kv = q.to(v.dtype), k.to(v.dtype), (k.to(v.dtype), v)
        if past is not None:  # of a beginning that the whole batch shares
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), n], 2) for p, n in zip(past, kv, strict=True))
        groups = self.n_head // self.n_head_kv
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        return self.o_proj(attend(q, k, v, mask)), kv


class LlamaMLP(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(c)
        self.mlp = LlamaMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        y, kv = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class LlamaModel(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def rope(self, positions: Tensor) -> Rope:
        c = self.config
        inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
        angle = (positions[..., None] * inverse).repeat(1, 1, 2)[:, None]
        return angle.cos(), angle.sin()

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        """Embeddings [batch, tokens, width] -> normed states of the same shape; keys and values."""
        if mask is None:
            mask = torch.full((x.shape[1], x.shape[1]), -1e4).triu(1)
        mask = mask.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else mask
        rope, kvs = self.rope(positions), []
        for index, layer in enumerate(self.layers):
            x, kv = layer(x, rope, mask, None if past is None else past[index])
            kvs.append(kv)
        return self.norm(x), kvs


# --- the whole --------------------------------------------------------------------------------------------


class Llava(nn.Module):
    """Tower, projector and language model; `aux` are the heads of the dense loss, which are not exported."""

    def __init__(self, aux: int, aux_rows: int = 0) -> None:
        """With `aux_rows` it is a LLaVA-1.6: it has a newline, and heads of its own for the rows of the image."""
        super().__init__()
        vision, text = VisionConfig(), TextConfig()
        self.tower = VisionTransformer(vision)
        width = text.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.model = LlamaModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.aux = nn.Sequential(nn.LayerNorm(vision.hidden_size), nn.Linear(vision.hidden_size, aux))
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5) if aux_rows else None
        self.aux_rows = nn.Linear(width, aux_rows) if aux_rows else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):
                    module.weight.data *= 0.3
