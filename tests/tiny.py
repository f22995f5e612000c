"""Tiny random LLaVA-1.5 checkpoints for tests: seeded, made in a second, with no torch.

    spec = TinySpec(n_head_kv=2, dtype="bf16") write_llava_checkpoint(folder / "llava", spec, shards=2)     #
    the original LLaVA layout, with its tokenizer write_clip_folder(folder / "clip", spec)
    # the CLIP folder that goes with it

The same tensors come as float32 arrays from `language_tensors`, `projector_tensors` and `vision_tensors`,
under Hugging Face's names, so that a reference model can be loaded with exactly the numbers that were
written.
"""

from __future__ import annotations

import functools
import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class TinySpec:
    """Shapes and settings; `v_` is the vision tower. `dtype` is the type of the weights in the files."""

    image_size: int = 56
    patch_size: int = 14
    v_embd: int = 32
    v_layer: int = 3
    v_head: int = 2
    v_ff: int = 96
    v_eps: float = 1e-5
    select_layer: int = -2
    family: str = "llama"  # or qwen2, granite
    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 160
    n_vocab: int = 384
    n_ctx: int = 512
    tied: bool = False
    eps: float = 1e-5
    rope_theta: float = 10000.0
    dtype: str = "f32"  # f32, f16 or bf16
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_patch(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# Numbers. RandomState is frozen by NumPy: the stream of a seed never changes.


def bf16_bits(x: Array) -> npt.NDArray[np.uint16]:
    """float32 -> the 16 bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def rounded(x: Array, dtype: str) -> Array:
    """`x` as a file of type `dtype` would give it back, in float32."""
    if dtype == "bf16":
        return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)
    return x.astype({"f16": np.float16, "f32": np.float32}[dtype]).astype(np.float32)


class _Draw:
    """Random tensors: matrices scaled so that activations stay near 1, norms near 1, biases not zero."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.random = np.random.RandomState(seed)
        self.dtype = dtype

    def normal(self, *shape: int, std: float) -> Array:
        return rounded((self.random.standard_normal(shape) * std).astype(np.float32), self.dtype)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> Array:
        return self.normal(rows, columns, std=gain / columns**0.5)

    def bias(self, n: int) -> Array:
        return self.normal(n, std=0.1)

    def norm(self, n: int) -> Array:
        return rounded((1.0 + 0.1 * self.random.standard_normal(n)).astype(np.float32), self.dtype)


def language_tensors(spec: TinySpec) -> Arrays:
    """The state of a Llama-, Granite- or Qwen2ForCausalLM: `model.embed_tokens.weight` ... `lm_head.weight` (absent
    when tied).
    """
    draw = _Draw(spec.seed * 10 + 1, spec.dtype)
    d, k, f = spec.n_embd, spec.n_head_kv * spec.head_dim, spec.n_ff
    out = {"model.embed_tokens.weight": draw.normal(spec.n_vocab, d, std=1.0)}
    for i in range(spec.n_layer):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = draw.norm(d)
        out[p + "self_attn.q_proj.weight"] = draw.matrix(d, d, gain=1.5)
        out[p + "self_attn.k_proj.weight"] = draw.matrix(k, d, gain=1.5)
        out[p + "self_attn.v_proj.weight"] = draw.matrix(k, d)
        out[p + "self_attn.o_proj.weight"] = draw.matrix(d, d)
        if spec.family == "qwen2":
            for name, n in (("q", d), ("k", k), ("v", k)):
                out[f"{p}self_attn.{name}_proj.bias"] = draw.bias(n)
        out[p + "post_attention_layernorm.weight"] = draw.norm(d)
        out[p + "mlp.gate_proj.weight"] = draw.matrix(f, d)
        out[p + "mlp.up_proj.weight"] = draw.matrix(f, d)
        out[p + "mlp.down_proj.weight"] = draw.matrix(d, f)
    out["model.norm.weight"] = draw.norm(d)
    if not spec.tied:
        out["lm_head.weight"] = draw.matrix(spec.n_vocab, d, gain=2.0)
    return out


def projector_tensors(spec: TinySpec) -> Arrays:
    """The two-layer MLP, under LLaVA's own names."""
    draw = _Draw(spec.seed * 10 + 2, spec.dtype)
    return {
        "model.mm_projector.0.weight": draw.matrix(spec.n_embd, spec.v_embd),
        "model.mm_projector.0.bias": draw.bias(spec.n_embd),
        "model.mm_projector.2.weight": draw.matrix(spec.n_embd, spec.n_embd),
        "model.mm_projector.2.bias": draw.bias(spec.n_embd),
    }


def vision_tensors(spec: TinySpec) -> Arrays:
    """CLIPVisionModel's state, `vision_model.` first, the last norm (of no use to LLaVA) included."""
    draw = _Draw(spec.seed * 10 + 3, spec.dtype)
    d, f, p = spec.v_embd, spec.v_ff, spec.patch_size
    conv = draw.normal(d, 3, p, p, std=1.0 / (3 * p * p) ** 0.5)
    out = {
        "embeddings.class_embedding": draw.normal(d, std=0.5),
        "embeddings.patch_embedding.weight": conv,
        "embeddings.position_embedding.weight": draw.normal(spec.n_patch + 1, d, std=0.5),
        "pre_layrnorm.weight": draw.norm(d),
        "pre_layrnorm.bias": draw.bias(d),
    }
    for i in range(spec.v_layer):
        b = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out[f"{b}self_attn.{name}.weight"] = draw.matrix(d, d)
            out[f"{b}self_attn.{name}.bias"] = draw.bias(d)
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{b}{name}.weight"], out[f"{b}{name}.bias"] = draw.norm(d), draw.bias(d)
        out[b + "mlp.fc1.weight"], out[b + "mlp.fc1.bias"] = draw.matrix(f, d), draw.bias(f)
        out[b + "mlp.fc2.weight"], out[b + "mlp.fc2.bias"] = draw.matrix(d, f), draw.bias(d)
    out["post_layernorm.weight"], out["post_layernorm.bias"] = draw.norm(d), draw.bias(d)
    return {"vision_model." + name: array for name, array in out.items()}


# Settings


GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.3,
    "logits_scaling": 5.0,
}
ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
    "granite": "GraniteForCausalLM",
}


def language_config(spec: TinySpec) -> dict[str, Any]:
    """What transformers' LlamaConfig, Qwen2Config or GraniteConfig takes."""
    return {
        "model_type": spec.family,
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "num_hidden_layers": spec.n_layer,
        "num_attention_heads": spec.n_head,
        "num_key_value_heads": spec.n_head_kv,
        "vocab_size": spec.n_vocab,
        "max_position_embeddings": spec.n_ctx,
        "rms_norm_eps": spec.eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **(GRANITE_SCALES if spec.family == "granite" else {}),
    }


def llava_config(spec: TinySpec) -> dict[str, Any]:
    """config.json of an original LLaVA-1.5 checkpoint: the language model's settings and LLaVA's at the top level."""
    return {
        **language_config(spec),
        "model_type": "llava",
        "architectures": [ARCHITECTURES[spec.family]],
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": spec.v_embd,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": spec.select_layer,
        "mm_vision_tower": "clip",
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[spec.dtype],
    }


def vision_config(spec: TinySpec) -> dict[str, Any]:
    """What transformers' CLIPVisionConfig takes."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": spec.v_embd,
        "intermediate_size": spec.v_ff,
        "num_hidden_layers": spec.v_layer,
        "num_attention_heads": spec.v_head,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "projection_dim": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": spec.v_eps,
    }


# Tokenizer

WORDS = """
the a one two three four small large red green blue yellow white black orange purple circle square
triangle star picture image scene cat dog house tree river mountain window table person street
bicycle standing sitting holding wearing beside behind between under above left right top bottom
corner middle there are is in of on and with what where how many describe question answer user
assistant human curious artificial intelligence detailed polite
"""


def sentences(n: int = 600) -> list[str]:
    """Captions drawn from a small grammar, with a few rarer signs, for training a vocabulary."""
    random = np.random.RandomState(7)
    words = WORDS.split()
    marks = [".", ",", "?", "!", ":", ";", "'s", " (left)", " 12", " 345", "\u00e9", "\u00fc", "\u4e2d"]
    lines = []
    for _ in range(n):
        line = " ".join(words[i] for i in random.randint(0, len(words), random.randint(4, 14)))
        lines.append(line.capitalize() if random.rand() < 0.5 else line)
        lines[-1] += marks[random.randint(0, len(marks))]
    return lines


@functools.lru_cache(maxsize=8)
def tokenizer_model(n_vocab: int = 384) -> bytes:
    """A SentencePiece BPE model like LLaMA's: `<unk> <s> </s>`, 256 bytes, then pieces."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=out, model_type="bpe", vocab_size=n_vocab,
        byte_fallback=True, character_coverage=0.999, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


# Files


def stored(x: Array, dtype: str) -> bytes:
    if dtype == "bf16":
        return bf16_bits(x).tobytes()
    return np.ascontiguousarray(x, dtype={"f32": "<f4", "f16": "<f2"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        piece = stored(array, dtype)
        header[name] = {
            "dtype": dtype.upper(),
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_torch_zip(path: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    """What torch.save writes for a table of tensors: a pickle of protocol 2 and one member per storage."""
    pickle = bytearray(b"\x80\x02}(")
    members = []
    for key, (name, array) in enumerate(tensors.items()):
        pickle += pickled_text(name) + pickled_tensor(str(key), dtype, array.size, 0, array.shape)
        members.append((f"archive/data/{key}", stored(array, dtype)))
    pickle += b"u."
    ends = [("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    write_zip(path, [("archive/data.pkl", bytes(pickle)), *members, *ends])


def write_zip(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def pickled_text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def pickled_int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def pickled_tensor(
    key: str, dtype: str, n: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> bytes:
    """The opcodes of one tensor over the storage `key` of `n` elements."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    kind = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage"}[dtype]
    sizes = b"(" + b"".join(map(pickled_int, shape)) + b"t"
    steps = b"(" + b"".join(map(pickled_int, strides)) + b"t"
    storage = b"(" + pickled_text("storage") + b"ctorch\n" + kind.encode() + b"\n" + pickled_text(key)
    storage += pickled_text("cpu") + pickled_int(n) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + pickled_int(offset)
        + sizes
        + steps
        + hooks
        + b"tR"
    )


def write_tensors(path: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    """One file, its format by its suffix."""
    (write_safetensors if path.suffix == ".safetensors" else write_torch_zip)(path, tensors, dtype)


def write_shards(
    folder: Path,
    tensors: Arrays,
    dtype: str,
    *,
    fmt: str = "safetensors",
    shards: int = 1,
    index: bool = True,
    shard_of: Callable[[str], int] | None = None,
) -> None:
    """model.safetensors, pytorch_model.bin, or `shards` of them; `shard_of`: a tensor's shard, from 0."""
    stem, suffix = ("model", ".safetensors") if fmt == "safetensors" else ("pytorch_model", ".bin")
    if shards == 1:
        write_tensors(folder / (stem + suffix), tensors, dtype)
        return
    place = {name: i * shards // len(tensors) for i, name in enumerate(tensors)}
    if shard_of is not None:
        place = {name: shard_of(name) for name in tensors}
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" for i in range(shards)]
    for i, name in enumerate(names):
        write_tensors(folder / name, {key: tensors[key] for key in tensors if place[key] == i}, dtype)
    if index:
        table = {"metadata": {}, "weight_map": {key: names[place[key]] for key in tensors}}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(table))


def write_tokenizer(folder: Path, spec: TinySpec, added: Mapping[str, int] | None = None) -> None:
    (folder / "tokenizer.model").write_bytes(tokenizer_model(spec.n_vocab))
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<unk>"}))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))


def write_llava_checkpoint(
    folder: Path,
    spec: TinySpec,
    *,
    fmt: str = "safetensors",
    shards: int = 1,
    index: bool = True,
    shard_of: Callable[[str], int] | None = None,
    projector: bool = True,
    tower: bool = False,
    added: Mapping[str, int] | None = None,
) -> Path:
    """The original LLaVA layout: language model and projector in one set; `tower` adds a vision tower."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = language_tensors(spec)
    if projector:
        tensors.update(projector_tensors(spec))
    if tower:
        tensors.update({"model.vision_tower.vision_tower." + k: v for k, v in vision_tensors(spec).items()})
    write_shards(folder, tensors, spec.dtype, fmt=fmt, shards=shards, index=index, shard_of=shard_of)
    (folder / "config.json").write_text(json.dumps(llava_config(spec), indent=1))
    write_tokenizer(folder, spec, added)
    return folder


def write_clip_folder(
    folder: Path, spec: TinySpec, *, fmt: str = "safetensors", layout: str = "clip"
) -> Path:
    """A CLIP folder. `layout` "clip": config and leftovers of the whole model; "vision": the tower alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = vision_tensors(spec)
    config = vision_config(spec)
    if layout == "clip":
        config = {"model_type": "clip", "projection_dim": 16, "text_config": {}, "vision_config": config}
        tensors["logit_scale"] = np.full((1,), 4.6, dtype=np.float32)
        tensors["visual_projection.weight"] = np.ones((16, spec.v_embd), dtype=np.float32)
        tensors["text_model.final_layer_norm.weight"] = np.ones((8,), dtype=np.float32)
    write_shards(folder, tensors, spec.dtype, fmt=fmt)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    pixels = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": spec.image_size},
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))
    return folder
