"""What the config.json of a LLaVA model says about its vision tower, in either of the two published layouts.

The original layout (liuhaotian/llava-*) keeps LLaVA's settings at the top level and names the tower,
`mm_vision_tower`; the Hugging Face layout (llava-hf/*) describes it in `vision_config` and has its own words
for the settings. Here both become the original's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints.json_file import Config
from .errors import CheckpointError, shown
from .families import CLIP, SIGLIP, TOWERS, tower_of

# Keys of the original layout that tell how the tower is used.
SETTINGS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "image_crop_resolution",
    "image_split_resolution",
)
# What LlavaConfig assumes where there is no vision_config at all.
LLAVA_TOWER = "clip-vit-large-patch14-336"
# What transformers assumes: (height, width).
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
_TILED = {"llava_next": _NEXT_PINPOINTS, "llava_onevision": _ONEVISION_PINPOINTS}
# The classes of transformers whose checkpoints are read.
HUGGING_FACE = ("llava", "llava_next", "llava_onevision", "vipllava")
_ONEVISION_TOWER = {**SIGLIP.published["siglip-so400m-patch14-384"], "num_hidden_layers": 26}


def is_hugging_face(table: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the layout of llava-hf."""
    names = table.get("architectures")
    generation = isinstance(names, list) and any(
        isinstance(name, str) and re.fullmatch("(Vip)?Llava.*ForConditionalGeneration", name)
        for name in names
    )
    nested = isinstance(table.get("text_config"), dict) or isinstance(table.get("vision_config"), dict)
    return generation or (nested and str(table.get("model_type")).startswith(("llava", "vipllava")))


def llava_settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the words of the original layout (SETTINGS and more); {} where it is not LLaVA's."""
    if is_hugging_face(table):
        return _translated(table)
    if any(
        key.startswith(("mm_", "vision_feature_")) or (key == "image_grid_pinpoints" and table[key])
        for key in table
    ):
        return dict(table)
    return {}


def _translated(table: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA-1.5 was trained on padded pictures, whatever its processor in transformers does since; models with
    SigLIP on what its processor makes, which the original code calls square.
    """
    kind = table.get("model_type")
    is_onevision = kind == "llava_onevision"
    vision = table.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    settings = {
        "mm_vision_select_layer": table.get("vision_feature_layer", -1 if is_onevision else None),
        "mm_vision_select_feature": table.get(
            "vision_feature_select_strategy", "full" if is_onevision else "default"
        ),
        "projector_hidden_act": table.get("projector_hidden_act"),
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square" if tower == SIGLIP.kind else "pad",
    }
    if kind == "vipllava":
        settings["mm_vision_select_layer"] = (
            table.get("vision_feature_layers") or table.get("vision_feature_layer") or [-2, -5, -8, -11, 6]
        )
        settings["projector_layernorm_eps"] = table.get("projector_layernorm_eps")
    if kind in _TILED:
        pairs = table.get("image_grid_pinpoints")
        aspect = table.get("vision_aspect_ratio") or "anyres_max_9"
        settings |= {
            "image_aspect_ratio": aspect if is_onevision else "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _widths_first(_TILED[kind] if pairs is None else pairs),
        }
    return {key: value for key, value in settings.items() if value is not None}


def _widths_first(pairs: Any) -> Any:
    """transformers reads a pair as height, width; the model and GGUF as width, height.

    The published list is a copy of the original's and holds each pair both ways: its order, which decides
    between two that fit as well, stays that of the training.
    """
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return pairs  # refused where it is read
    swapped = [[width, height] for height, width in pairs]
    both_ways = all(pair in pairs for pair in swapped)
    return pairs if both_ways else swapped


def tower_base(table: Mapping[str, Any]) -> tuple[str, str] | None:
    """`mm_vision_tower` as it stands and its last part, or None where the config names no tower."""
    name = table.get("mm_vision_tower", table.get("vision_tower"))
    if not isinstance(name, str):
        return None
    base = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return None if base in ("", ".", "..") or "\0" in name else (name, base)


def tower_folders(model: Path, table: Mapping[str, Any]) -> list[Path]:
    """Where the tower that a config names may lie: at its path, in the model's folder, beside it."""
    found = tower_base(table)
    if found is None:
        return []
    name, base = found
    folders = [model / base, model.parent / base]
    if Path(name).is_absolute():
        folders.insert(0, Path(name))
    elif ".." not in Path(name).parts:
        folders += [model / name, model.parent / name]
    return [folder for folder in dict.fromkeys(folders) if (folder / "config.json").is_file()]


def nested_tower(config: Config) -> Config:
    """The tower's own settings in the Hugging Face layout."""
    vision = config.sub("vision_config")
    is_onevision = config.get("model_type") == "llava_onevision"
    if vision is None:
        table = _ONEVISION_TOWER if is_onevision else CLIP.published[LLAVA_TOWER]
        return Config(
            f"{config.where}: vision_config",
            {"model_type": "siglip_vision_model", **table} if is_onevision else table,
        )
    kind = vision.get("model_type") or (SIGLIP.kind if is_onevision else CLIP.kind)
    tower = tower_of(kind)
    if tower is None:
        raise CheckpointError(
            f"{vision.where}: a tower of type {shown(kind)}, only CLIP's and SigLIP's are supported"
        )
    vision.defaults = {"model_type": kind, **tower.defaults}
    return vision


def known_tower(config: Config) -> Config | None:
    """The settings of a published tower that the config names, or None."""
    found = tower_base(config.table)
    for tower in TOWERS:
        if found is not None and found[1].lower() in tower.published:
            settings = {"model_type": tower.kind, **tower.published[found[1].lower()]}
            return Config(f"{config.where}: mm_vision_tower {found[1]}", {}, settings)
    return None
