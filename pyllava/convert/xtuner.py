"""The official layout of xtuner: a language model, and folders beside it for what LLaVA adds.

`projector/` holds the projector as a model of its own. The tower is in `visual_encoder/` where all of it was trained,
a LoRA adapter of it in `visual_encoder_adapter/` where that was; its base is another download.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import Checkpoint, open_checkpoint, summary
from .checkpoints.json_file import Config, read_json, read_json_if_there
from .checkpoints.tensor import Adapted, Tensor
from .errors import CheckpointError, shown

PROJECTOR = "projector"
TOWER = "visual_encoder"
TOWER_ADAPTER = "visual_encoder_adapter"
LANGUAGE_ADAPTER = "llm_adapter"  # which is not merged here
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<kind>[AB])(\.default)?\.weight")


def xtuner_settings(model: Path) -> dict[str, Any]:
    """LLaVA's settings in the words of the original layout, as xtuner trains; {} where the folder is not its."""
    if not (model / PROJECTOR / "config.json").is_file():
        return {}
    projector = read_json(model / PROJECTOR / "config.json")
    adapter = read_json_if_there(model / TOWER_ADAPTER / "adapter_config.json")
    tower = TOWER if (model / TOWER).is_dir() else adapter.get("base_model_name_or_path")
    settings = {
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "projector_hidden_act": projector.get("hidden_act"),
        "image_aspect_ratio": "pad",
    }
    return {key: value for key, value in settings.items() if value is not None}


def projector_beside(model: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """The projector by its original names, {} where there is none; `stack` closes its files."""
    if not (model / PROJECTOR / "config.json").is_file():
        return {}
    tensors = stack.enter_context(open_checkpoint(model / PROJECTOR))
    return {"model.mm_projector." + name.removeprefix("model."): x for name, x in tensors.items()}


def adapted_tower(
    model: Path, tower: Mapping[str, Tensor], stack: contextlib.ExitStack
) -> Mapping[str, Tensor]:
    """The tower with the adapter beside the model merged into it, where there is one: W + alpha / r * B A."""
    folder = model / TOWER_ADAPTER
    if not folder.is_dir():
        return tower
    scale = _scale(folder)
    adapter = stack.enter_context(Checkpoint([_adapter_file(folder)]))
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{folder}: {shown(name)}: need lora_A and lora_B alone")
        factors.setdefault(found["name"], {})[found["kind"]] = tensor
    if not factors:
        raise CheckpointError(f"{folder}: an adapter without tensors")
    merged = dict(tower)
    for name, pair in factors.items():
        target = _target(folder, name, tower)
        merged[target] = _adapted(folder, tower[target], pair, scale)
    return merged


def _adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin")


def _scale(folder: Path) -> float:
    config = Config(str(folder / "adapter_config.json"), read_json(folder / "adapter_config.json"))
    for key, plain in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(key) not in (None, plain):
            raise CheckpointError(f"{config.where}: {key} is {shown(config.get(key))}, need {plain!r}")
    for key in (
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    ):
        if config.get(key):
            raise CheckpointError(
                f"{config.where}: {key} is {shown(config.get(key))}, which is not supported"
            )
    return config.number("lora_alpha", low=0.0) / config.integer("r", high=65536)


def _target(folder: Path, name: str, tower: Mapping[str, Tensor]) -> str:
    """The tower's tensor that an adapter's module is of. Both may have `vision_model.` in front, or not."""
    end = name.removeprefix("base_model.model.").removeprefix("vision_model.") + ".weight"
    for target in (f"vision_model.{end}", end):
        if target in tower:
            return target
    raise CheckpointError(f"{folder}: {shown(name)} is of no tensor of the vision tower: {summary(tower)}")


def _adapted(folder: Path, tensor: Tensor, pair: Mapping[str, Tensor], scale: float) -> Adapted:
    shapes = {kind: list(factor.shape) for kind, factor in sorted(pair.items())}
    rank = pair["A"].n_rows if "A" in pair else 0
    if len(tensor.shape) != 2 or shapes != {"A": [rank, tensor.shape[1]], "B": [tensor.shape[0], rank]}:
        raise CheckpointError(
            f"{folder}: {shown(tensor.name)} of shape {list(tensor.shape)} with factors of {shown(str(shapes))}"
        )
    return Adapted(**vars(tensor), down=pair["A"].rows(0, rank), up=pair["B"], scale=scale)
