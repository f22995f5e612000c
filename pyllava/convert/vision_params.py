"""What the projector file says about the vision tower: from the CLIP folder's configs and LLaVA's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import checkpoint_files
from .checkpoints.json_file import Config, read_json, read_json_if_there
from .errors import CheckpointError, shown
from .families import Tower, tower_of
from .llava_config import llava_settings
from .script import log

MAX_PINPOINTS = 64  # pairs
MAX_FEATURES = 8
CROPS = (224, 336, 384, 448, 512)  # what pinpoints that are given as a text may count
BICUBIC = 3  # Pillow's number of it


@dataclass(frozen=True)
class VisionParams:
    """The tower. `n_layer`: of all of it. `mean` and `std` are per colour, of pixels in 0..1."""

    family: Tower
    image_size: int
    patch_size: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    projection_dim: int
    eps: float
    activation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class LlavaFacts:
    """How LLaVA uses the tower. `feature_layers` counts hidden states, 0 = input of the first layer."""

    feature_layers: tuple[int, ...]
    aspect_ratio: str | None
    projector_text: str | None  # mm_projector_type
    pinpoints: tuple[int, ...]  # w, h, w, h, ...; empty unless the model is of the 1.6 kind
    merge_type: str | None
    crop_resolution: int | None
    split_resolution: int | None


def read_vision_params(
    folder: Path, *, layout: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> VisionParams:
    """`layout`: "vision" (config.json is the tower's own), "clip" (it holds vision_config), None (either)."""
    return vision_params(tower_config(folder, layout), pixel_settings(folder), mean=mean, std=std)


def pixel_settings(folder: Path) -> Mapping[str, Any]:
    """What a folder's image processor says; {} where there is none."""
    pixels = read_json_if_there(folder / "preprocessor_config.json")
    nested = read_json_if_there(folder / "processor_config.json").get("image_processor")
    return pixels or (nested if isinstance(nested, dict) else {})


def vision_params(
    config: Config,
    pixels: Mapping[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> VisionParams:
    """The tower that `config` describes, all numbers checked. `mean` and `std` override those of `pixels`."""
    family = known_family(config)
    image, patch = config.integer("image_size", high=8192), config.integer("patch_size", high=8192)
    if image < patch:
        raise CheckpointError(f"{config.where}: image_size {image} is less than patch_size {patch}")
    n_embd, n_head = (
        config.integer("hidden_size", high=65536),
        config.integer("num_attention_heads", high=4096),
    )
    if n_embd % n_head:
        raise CheckpointError(f"{config.where}: hidden_size {n_embd} does not divide by {n_head} heads")
    activation = config.text("hidden_act")
    if activation is None or activation not in family.activations:
        raise CheckpointError(
            f"{config.where}: hidden_act {shown(activation)}, need one of {', '.join(family.activations)}"
        )
    if pixels.get("resample") not in (None, BICUBIC):
        log.warning(
            "the image processor resizes with Pillow's method %s, pyllava with %d (bicubic)",
            *(shown(pixels["resample"]), BICUBIC),
        )
    channels = config.get("num_channels")
    if channels not in (None, 3):
        raise CheckpointError(f"{config.where}: num_channels is {shown(channels)}, need 3")
    return VisionParams(
        family=family,
        image_size=image,
        patch_size=patch,
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", high=1 << 20),
        n_layer=config.integer("num_hidden_layers", high=512),
        n_head=n_head,
        projection_dim=config.integer("projection_dim", low=0),
        eps=config.number("layer_norm_eps", high=1.0),
        activation=family.activations[activation],
        mean=_three("image_mean", mean, pixels.get("image_mean"), family.mean, low=-10.0),
        std=_three("image_std", std, pixels.get("image_std"), family.std, low=0.0),
    )


def known_family(config: Config) -> Tower:
    """The family of the tower that a config describes."""
    kind = config.get("model_type")
    family = tower_of({"siglip": "siglip_vision_model", "clip": None}.get(kind, kind))
    if family is None:
        raise CheckpointError(
            f"{config.where}: a tower of type {shown(kind)}, only CLIP's and SigLIP's are supported"
        )
    return family


def tower_config(folder: Path, layout: str | None) -> Config:
    """The tower's settings in a CLIP folder's config.json; `layout` as in `read_vision_params`."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; need the folder of the CLIP model")
    table = read_json(path)
    whole = Config(str(path), table)
    nested = whole.sub("vision_config")
    if layout == "vision" or (layout is None and nested is None):
        if "hidden_size" in table and ("image_size" in table or "patch_size" in table):
            return Config(str(path), table, known_family(whole).defaults)
        raise CheckpointError(
            f"{path}: neither a CLIP model (vision_config) nor a vision tower (image_size, patch_size)"
        )
    if nested is None:
        raise CheckpointError(
            f"{path}: no vision_config; drop --clip-model-is-openclip or give a full CLIP folder"
        )
    own = whole if nested.get("model_type") is None else nested
    nested.defaults = {"model_type": known_family(own).kind, **known_family(own).defaults}
    if "projection_dim" in table:
        nested.defaults = {**nested.defaults, "projection_dim": whole.get("projection_dim")}
    return nested


def _three(
    name: str, chosen: Sequence[float] | None, found: Any, default: tuple[float, ...], low: float
) -> tuple[float, ...]:
    """Three numbers above `low`: chosen by the user, else found in the preprocessor config, else the tower's."""
    values = chosen if chosen is not None else found if found is not None else default
    right = isinstance(values, (list, tuple)) and len(values) == 3
    if not right or not all(type(v) in (int, float) and low < v < 100.0 for v in values):
        raise CheckpointError(f"{name}: need three numbers above {low:g}, found {shown(str(values))}")
    return tuple(float(value) for value in values)


def read_llava_facts(projector: Path, clip_folder: Path, tower: VisionParams) -> LlavaFacts:
    """From the config.json beside the projector, else the CLIP folder's own, else the defaults."""
    for folder in (projector.resolve().parent, clip_folder):
        settings = llava_settings(read_json_if_there(folder / "config.json"))
        if settings:
            return llava_facts(Config(str(folder / "config.json"), settings), tower)
    return llava_facts(Config("config.json", {}), tower)


def llava_facts(config: Config, tower: VisionParams) -> LlavaFacts:
    """From LLaVA's settings, in the words of the original layout."""
    _check_selection(config, tower.family)
    if config.get("projector_hidden_act") not in (None, "gelu"):
        found = shown(config.get("projector_hidden_act"))
        raise CheckpointError(f"{config.where}: projector_hidden_act is {found}, need 'gelu'")
    if config.get("projector_layernorm_eps") not in (None, 1e-5):
        found = shown(config.get("projector_layernorm_eps"))
        raise CheckpointError(f"{config.where}: projector_layernorm_eps is {found}, need 1e-5")
    merge, aspect = config.text("mm_patch_merge_type"), config.text("image_aspect_ratio")
    if merge is None and config.get("image_grid_pinpoints") and (aspect or "anyres").startswith("anyres"):
        merge = "spatial_unpad"  # a config made by hand: there are resolutions for one purpose alone
    tiled = merge is not None and merge.startswith("spatial") and "unpad" in merge
    return LlavaFacts(
        feature_layers=_feature_layers(config, tower.n_layer),
        aspect_ratio="anyres" if tiled and aspect is None else aspect,
        projector_text=config.text("mm_projector_type"),
        pinpoints=_pinpoints(config, tower.image_size) if tiled else (),
        merge_type=merge,
        crop_resolution=_optional_size(config, "image_crop_resolution"),
        split_resolution=_optional_size(config, "image_split_resolution"),
    )


def _check_selection(config: Config, family: Tower) -> None:
    """The class token is left out where the tower has one. The original code asks nothing of SigLIP's, whose
    "patch" is all there is; transformers' "default" drops the first row, whatever it is.
    """
    select = config.get("mm_vision_select_feature", "vision_feature_select_strategy")
    has_class = "embeddings.class_embedding" in family.ends
    if select not in ((None, "patch", "default") if has_class else (None, "patch", "cls_patch", "full")):
        need = "'patch' (no class token)" if has_class else "'full' (there is no class token)"
        raise CheckpointError(f"{config.where}: features {shown(select)} are selected, only {need} is known")


def _feature_layers(config: Config, n_layer: int) -> tuple[int, ...]:
    """The hidden states that feed the projector, side by side in this order; LLaVA: -2."""
    value = config.get("mm_vision_select_layer", "vision_feature_layer")
    value = -2 if value is None else value
    values = value if isinstance(value, list) else [value]
    if not 1 <= len(values) <= MAX_FEATURES:
        raise CheckpointError(
            f"{config.where}: {len(values)} vision feature layers, need 1 to {MAX_FEATURES}"
        )
    return tuple(_feature_layer(config, value, n_layer) for value in values)


def _feature_layer(config: Config, value: Any, n_layer: int) -> int:
    """The number of a hidden state: a negative i counts from the end, L + i + 1."""
    if type(value) is not int:
        raise CheckpointError(f"{config.where}: vision feature layer {shown(str(value))}, need a number")
    layer = value if value >= 0 else n_layer + value + 1
    if not 1 <= layer <= n_layer:
        raise CheckpointError(
            f"{config.where}: vision feature layer {value} of a tower with {n_layer} layers"
        )
    return layer


def _pinpoints(config: Config, image_size: int) -> tuple[int, ...]:
    """Grid resolutions of LLaVA-1.6, flattened."""
    pairs = config.get("image_grid_pinpoints")
    if isinstance(pairs, str):
        pairs = _written_out(config.where, pairs, image_size)
    if pairs is None:
        raise CheckpointError(
            f"{config.where}: image_grid_pinpoints are missing, which a model with "
            f"{shown(config.get('mm_patch_merge_type'))} needs"
        )
    right = isinstance(pairs, list) and 0 < len(pairs) <= MAX_PINPOINTS
    if not right or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise CheckpointError(
            f"{config.where}: image_grid_pinpoints need 1 to {MAX_PINPOINTS} pairs of sizes"
        )
    flat = [size for pair in pairs for size in pair]
    if not all(type(size) is int and 0 < size <= 16384 for size in flat):
        raise CheckpointError(f"{config.where}: image_grid_pinpoints hold a size outside 1..16384")
    return tuple(flat)


def _written_out(where: str, text: str, image_size: int) -> list[list[int]]:
    """What LLaVA-NeXT makes of "(1x1),...,(6x6)": all from the first to the last, in sizes of a view."""
    found = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,3})x(\d{1,3})\)", text)]
    if not found or image_size not in CROPS:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints {shown(text)} with views of {image_size} pixels: need "
            f"'(1x1),...,(6x6)' and views of one of {', '.join(map(str, CROPS))}"
        )
    (left, top), (right, bottom) = found[0], found[-1]
    return [[i * image_size, j * image_size] for i in range(left, right + 1) for j in range(top, bottom + 1)]


def _optional_size(config: Config, key: str) -> int | None:
    return None if config.get(key) is None else config.integer(key, high=16384)


def weight_files(folder: Path) -> list[Path]:
    """The CLIP folder's weights, with the hint that this step needs them."""
    try:
        return checkpoint_files(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (-m is the folder of the CLIP vision model)") from None
