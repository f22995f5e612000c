"""The wider LLaVA family: tiny random checkpoints as `transformers` saves them, one for each kind of model.

What matters of the real models is kept: the kind and the number of the tower's layers, a side that is no multiple of the
patch, which hidden states are read, the shape of the list of resolutions, ties, scalings, bias. The weights are numbers that
f16 and bf16 both hold, so that files of f16 are the same model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from .published import Judge, Picture
from .reference import Array, torch, transformers

N_VOCAB = 384 + 64  # rows that round the vocabulary up, <image> and <pad> among them
IMAGE_TOKEN = 384
SIDE, PATCH = 59, 14  # four patches a side; three pixels are never seen


@dataclass(frozen=True)
class Variant:
    """`config` of the class `kind`; `processor` makes the pixels; `like`: the published models."""

    like: str
    kind: str
    config: Callable[[], Any]
    processor: Callable[[], Any]


# Weights


def _drawn(name: str, x: Any, random: np.random.RandomState) -> Array:
    """Scaled so that activations stay near 1, norms near 1, biases not zero."""
    shape = tuple(x.shape)
    values = random.standard_normal(shape)
    if "norm" in name.split(".")[-2] and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 1 and "newline" not in name:
        values = 0.1 * values
    elif (len(shape) > 1 and "embed" not in name.split(".")[-2]) or "patch_embedding" in name:
        values = values / float(np.prod(shape[1:])) ** 0.5
    return tiny.rounded(tiny.rounded(values.astype(np.float32), "bf16"), "f16")


def write(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """The checkpoint with its tokenizer and the settings of its image processor."""
    random = np.random.RandomState(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = getattr(transformers, variant.kind)(variant.config())
    with torch.no_grad():
        for name, x in net.named_parameters():
            x.copy_(torch.from_numpy(_drawn(name, x, random)))
    folder.mkdir(parents=True)
    net.to(torch.bfloat16).save_pretrained(folder)
    variant.processor().save_pretrained(folder)
    added = {"<image>": IMAGE_TOKEN, "<pad>": IMAGE_TOKEN + 1}
    tiny.write_tokenizer(folder, tiny.TinySpec(), added)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Keys of a JSON file; None drops one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


# The judge


class Model(Judge):
    """A checkpoint as `transformers` runs it, with the pixels of its image processor."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        super().__init__(folder, variant.kind, IMAGE_TOKEN)
        self.processor = variant.processor()

    def seen(self, *pictures: Picture) -> dict[str, Any]:
        """Of one prompt."""
        nested = "batch_num_images" in self.processor.model_input_names
        return dict(self.processor([list(pictures)] if nested else list(pictures), return_tensors="pt"))


# Parts


def siglip(n_layer: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 134,  # no multiple of 32 either in the real ones
        "num_hidden_layers": n_layer,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        **more,
    }


def text(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": N_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 385,
        **more,
    }


def clip(n_layer: int) -> dict[str, Any]:
    return {
        **siglip(n_layer),
        "model_type": "clip_vision_model",
        "intermediate_size": 96,
        "projection_dim": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def qwen2() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return text("qwen2", rms_norm_eps=1e-6, rope_parameters=rope, tie_word_embeddings=True)


# Of the pairs of a head of 16 the first is left as it is, the second is between, the others are stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HALF = [0.5, 0.5, 0.5]


def padding() -> Any:
    size = {"height": SIDE, "width": SIDE}
    return transformers.LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, do_pad=True)


def squashing() -> Any:
    size = {"height": SIDE, "width": SIDE}
    return transformers.SiglipImageProcessorPil(size=size, image_mean=HALF, image_std=HALF)


def anyres_max(side: int = SIDE) -> Any:
    """LLaVA-OneVision's: up to six tiles either way."""
    return transformers.LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=HALF,
        image_std=HALF,
        image_grid_pinpoints=six_by_six(side),
    )


def anyres() -> Any:
    return transformers.LlavaNextImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=HALF,
        image_std=HALF,
        image_grid_pinpoints=granite_pinpoints(),
    )


def granite_pinpoints() -> list[list[int]]:
    """Granite Vision's 27: flat and slender grids of up to ten tiles."""
    most = {1: 10, 2: 5, 3: 3, 4: 2, 5: 2, **dict.fromkeys(range(6, 11), 1)}
    return [[SIDE * i, SIDE * j] for i, n in most.items() for j in range(1, n + 1)]


def six_by_six(side: int) -> list[list[int]]:
    return [[side * i, side * j] for i in range(1, 7) for j in range(1, 7)]


# The models


def joycaption() -> Any:
    return transformers.LlavaConfig(
        vision_config=siglip(27),
        text_config=text("llama", tie_word_embeddings=False, rope_parameters=LLAMA3),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE_TOKEN,
    )


def interleave() -> Any:
    return transformers.LlavaConfig(
        vision_config=siglip(26, vision_use_head=False),
        text_config=qwen2(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=True,
    )


def onevision(side: int = SIDE, n_layer: int = 26) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=siglip(n_layer, image_size=side, vision_use_head=False),
        text_config=qwen2(),
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=six_by_six(side),
    )


def granite() -> Any:
    scales = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
    rope = {"rope_type": "default", "rope_theta": 3e5}
    return transformers.LlavaNextConfig(
        vision_config=siglip(27),
        text_config=text(
            "granite",
            attention_multiplier=0.015625,
            tie_word_embeddings=True,
            rope_parameters=rope,
            **scales,
        ),
        vision_feature_layer=[-24, -20, -12, -1],
        vision_feature_select_strategy="full",
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=granite_pinpoints(),
    )


def phi3() -> Any:
    """Heads in one matrix with keys and values, the gate with what it gates."""
    return transformers.LlavaConfig(
        vision_config=clip(24),
        text_config=text("phi3", tie_word_embeddings=False),
        image_token_index=IMAGE_TOKEN,
    )


def vip() -> Any:
    return transformers.VipLlavaConfig(
        vision_config=clip(24), text_config=text("llama"), image_token_index=IMAGE_TOKEN
    )


VARIANTS = {
    "joycaption": Variant(
        "llama-joycaption-beta-one-hf-llava", "LlavaForConditionalGeneration", joycaption, squashing
    ),
    "interleave": Variant(
        "llava-interleave-qwen-0.5b-hf", "LlavaForConditionalGeneration", interleave, squashing
    ),
    "onevision": Variant(
        "llava-onevision-qwen2-0.5b-ov-hf",
        "LlavaOnevisionForConditionalGeneration",
        onevision,
        anyres_max,
    ),
    "granite": Variant("granite-vision-3.2-2b", "LlavaNextForConditionalGeneration", granite, anyres),
    "phi3": Variant("llava-phi-3-mini-xtuner", "LlavaForConditionalGeneration", phi3, padding),
    "vip": Variant("vip-llava-7b-hf", "VipLlavaForConditionalGeneration", vip, padding),
}
