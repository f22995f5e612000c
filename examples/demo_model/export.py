"""Writes a trained model in the layout of the original LLaVA checkpoints.

python -m examples.demo_model.export --run DIR --out OUT                   ->  OUT/llava-demo/  OUT/clip-demo/
python -m examples.demo_model.export --run DIR --out OUT --variant 1.6     ->  OUT/llava-demo-1.6/  OUT/clip-demo-1.6/

Those of 1.5 are pickled f16 shards without the vision tower, those of 1.6 bf16 safetensors that hold it too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import anyres
from .model import MEAN, STD, TextConfig, VisionConfig


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def renamed(state: dict[str, Tensor], old: str, new: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors whose names begin with `old`, which becomes `new`."""
    return {new + k[len(old) :]: v.to(dtype).clone() for k, v in state.items() if k.startswith(old)}


def by_shard(state: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The language model and the projector in two shards, the projector in the last."""
    llama = renamed(state, "model.", "model.", dtype)
    head = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    first = {k: t for k, t in llama.items() if k.startswith(head)}
    last = {k: t for k, t in llama.items() if not k.startswith(head)}
    last |= renamed(state, "lm_head.", "lm_head.", dtype)
    last |= renamed(state, "projector.", "model.mm_projector.", dtype)
    return first, last


def write_index(path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    index = {k: name for name, tensors in shards.items() for k in tensors}
    size = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    write_json(path, {"metadata": {"total_size": size}, "weight_map": index})


def write_weights_1_5(state: dict[str, Tensor], out: Path) -> None:
    names = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    shards = dict(zip(names, by_shard(state, torch.float16), strict=True))
    for name, tensors in shards.items():
        torch.save(tensors, out / name)
    write_index(out / "pytorch_model.bin.index.json", shards)


def write_weights_1_6(state: dict[str, Tensor], out: Path) -> None:
    """With the newline and the whole vision tower, which the training of a 1.6 changes."""
    first, last = by_shard(state, torch.bfloat16)
    last["model.image_newline"] = state["image_newline"].to(torch.bfloat16)
    tower = clip_tensors(state, torch.bfloat16)
    last |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    shards = {f"model-{n:05}-of-00002.safetensors": tensors for n, tensors in ((1, first), (2, last))}
    for name, tensors in shards.items():
        save_file(tensors, out / name, {"format": "pt"})
    write_index(out / "model.safetensors.index.json", shards)


TILES = {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 2 * anyres.SIDE,
    "image_grid_pinpoints": [list(pinpoint) for pinpoint in anyres.PINPOINTS],
    "image_split_resolution": 2 * anyres.SIDE,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "torch_dtype": "bfloat16",
    "unfreeze_mm_vision_tower": True,
}


def export_llava(state: dict[str, Tensor], tokenizer: Path, out: Path, variant: str, clip: str) -> None:
    """The language model, the projector and, in a 1.6, the tower; `clip` is the name of the CLIP folder."""
    c, v = TextConfig(), VisionConfig()
    out.mkdir(parents=True, exist_ok=True)
    (write_weights_1_6 if variant == "1.6" else write_weights_1_5)(state, out)
    config = {
        "_name_or_path": out.name,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "max_sequence_length": c.max_position_embeddings,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": v.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": clip,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    write_json(out / "config.json", config | (TILES if variant == "1.6" else {}))
    limits = {"bos_token_id": 1, "eos_token_id": 2, "max_length": c.max_position_embeddings}
    write_json(out / "generation_config.json", limits)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **special,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": c.max_position_embeddings,
            "padding_side": "right",
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write_json(out / "special_tokens_map.json", special)
    shutil.copyfile(tokenizer, out / "tokenizer.model")


def clip_tensors(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    c = VisionConfig()
    tensors = renamed(state, "tower.", "vision_model.", dtype)
    patch = "vision_model.embeddings.patch_embedding.weight"
    tensors[patch] = tensors[patch].reshape(-1, 3, c.patch_size, c.patch_size)
    return tensors


def export_clip(state: dict[str, Tensor], out: Path) -> None:
    """The vision tower as a CLIP folder (vision half only)."""
    c = VisionConfig()
    out.mkdir(parents=True, exist_ok=True)
    save_file(clip_tensors(state, torch.float32), out / "model.safetensors", {"format": "pt"})
    vision = {
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": c.hidden_size,
        "image_size": c.image_size,
        "intermediate_size": c.intermediate_size,
        "layer_norm_eps": c.layer_norm_eps,
        "num_attention_heads": c.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": c.num_hidden_layers,
        "patch_size": c.patch_size,
        "projection_dim": c.hidden_size,
    }
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip", "projection_dim": c.hidden_size}
    write_json(out / "config.json", {**config, "torch_dtype": "float32", "vision_config": vision})
    write_json(
        out / "preprocessor_config.json",
        {
            "crop_size": c.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "resample": 3,
            "size": c.image_size,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the --out of training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=("1.5", "1.6"), default="1.5")
    options = parser.parse_args()
    suffix = "" if options.variant == "1.5" else "-1.6"
    state = torch.load(options.run / "model.pt", map_location="cpu")
    llava, clip = f"llava-demo{suffix}", f"clip-demo{suffix}"
    export_llava(state, options.run / "tokenizer.model", options.out / llava, options.variant, clip)
    export_clip(state, options.out / clip)


if __name__ == "__main__":
    main()
