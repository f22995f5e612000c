"""Tiny LLaVA checkpoints as they are published: LLaVA-1.6 of the original authors, 1.5 and 1.6 of Hugging
Face.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny import (
    Array,
    Arrays,
    TinySpec,
    language_config,
    language_tensors,
    llava_config,
    projector_tensors,
    rounded,
    vision_config,
    vision_tensors,
    write_shards,
    write_tokenizer,
)

TOWER = "clip-tiny"  # what the configs call the tower


def pinpoints(spec: TinySpec) -> list[list[int]]:
    """The five resolutions of LLaVA-1.6, width and height, for this size of image."""
    s = spec.image_size
    return [[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]]


def newline(spec: TinySpec) -> Array:
    x = np.random.RandomState(spec.seed * 10 + 4).standard_normal(spec.n_embd) * 0.5
    return rounded(x.astype(np.float32), spec.dtype)


def config_16(spec: TinySpec) -> dict[str, Any]:
    """config.json of LLaVA-1.6, original layout."""
    return {
        **llava_config(spec),
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": pinpoints(spec),
        "image_split_resolution": 224,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_tower": f"openai/{TOWER}",
        "unfreeze_mm_vision_tower": True,
    }


def tensors_16(spec: TinySpec) -> Arrays:
    """Everything that a checkpoint of LLaVA-1.6 holds, original names."""
    tower = {"model.vision_tower.vision_tower." + k: v for k, v in vision_tensors(spec).items()}
    return {
        "model.image_newline": newline(spec),
        **language_tensors(spec),
        **projector_tensors(spec),
        **tower,
    }


def write_16(
    folder: Path,
    spec: TinySpec,
    *,
    fmt: str = "safetensors",
    shards: int = 1,
    shard_of: Callable[[str], int] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """An original LLaVA-1.6 checkpoint; `without`: tensors and settings to leave out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x for name, x in tensors_16(spec).items() if name not in without}
    write_shards(folder, tensors, spec.dtype, fmt=fmt, shards=shards, shard_of=shard_of)
    config = {key: value for key, value in config_16(spec).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, spec)
    return folder


def write_tower_config(folder: Path, spec: TinySpec) -> Path:
    """A folder with the tower's config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vision_config(spec)))
    return folder


def hf_name(name: str, newer: bool) -> str:
    """An original name as llava-hf writes it; `newer`: as transformers does since 4.52."""
    name = name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
    name = name.replace("model.mm_projector.2", "multi_modal_projector.linear_2")
    name = name.replace("model.image_newline", "image_newline")
    name = name.replace("model.vision_tower.vision_tower.", "vision_tower.")
    if name == "lm_head.weight":
        return name if newer else "language_model.lm_head.weight"
    if name.startswith("model."):
        name = ("language_model." if newer else "language_model.model.") + name.removeprefix("model.")
    return f"model.{name}" if newer else name


def hf_config(spec: TinySpec, *, tiles: bool, n_rows: int, drop: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested, with the keys in `drop` left to the defaults of transformers."""
    text = {key: value for key, value in language_config(spec).items() if key not in drop}
    vision = {key: value for key, value in vision_config(spec).items() if key not in drop}
    table: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration" if tiles else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if tiles else "llava",
        "ignore_index": -100,
        "image_token_index": spec.n_vocab,
        "projector_hidden_act": "gelu",
        "text_config": {**text, "vocab_size": n_rows},
        "tie_word_embeddings": spec.tied,
        "vision_config": vision,
        "vision_feature_layer": spec.select_layer,
        "vision_feature_select_strategy": "default",
    }
    if tiles:
        table |= {"image_grid_pinpoints": pinpoints(spec), "use_image_newline_parameter": True}
    return table


def write_hf(
    folder: Path,
    spec: TinySpec,
    *,
    tiles: bool = False,
    newer: bool = False,
    shards: int = 1,
    padded: bool = False,
    drop: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
) -> Path:
    """The layout of llava-hf, 1.6 where `tiles`; `padded`: `<image>` and `<pad>` added, rows rounded up to
    64.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_16(spec)
    if not tiles:
        del tensors["model.image_newline"]
    n_rows = -(-(spec.n_vocab + 2) // 64) * 64 if padded else spec.n_vocab
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = rounded(np.full((n_rows - spec.n_vocab, spec.n_embd), 0.25, np.float32), spec.dtype)
        tensors[name] = np.concatenate([tensors[name], extra])
    renamed = {hf_name(name, newer): x for name, x in tensors.items()}
    write_shards(folder, renamed, spec.dtype, shards=shards)
    config = {**hf_config(spec, tiles=tiles, n_rows=n_rows, drop=drop), **(more or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, spec)
    if padded:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        names = {0: "<unk>", 1: "<s>", 2: "</s>", spec.n_vocab: "<image>", spec.n_vocab + 1: "<pad>"}
        settings["added_tokens_decoder"] = {str(i): {"content": n, "special": True} for i, n in names.items()}
        settings["pad_token"] = "<pad>"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "added_tokens.json").write_text(
            json.dumps({"<image>": spec.n_vocab, "<pad>": spec.n_vocab + 1})
        )
    return folder
