"""The vision tower of a LLaVA model: its settings, wherever they are, and the `vit/config.json` of the steps
for 1.6.
"""

from __future__ import annotations

import json
from pathlib import Path

from .._part_file import replacing
from ..formats import F16
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.json_file import Config, read_json
from .checkpoints.unsuitable import adapter_advice, adapter_in
from .errors import CheckpointError, shown
from .families import TOWERS
from .llava_config import (
    HUGGING_FACE,
    SETTINGS,
    is_hugging_face,
    known_tower,
    llava_settings,
    nested_tower,
    tower_folders,
)
from .projector_file import tower_tensors
from .script import log
from .unsupported import check_supported
from .vision_params import llava_facts, tower_config, vision_params
from .xtuner import LANGUAGE_ADAPTER, xtuner_settings


def read_llava_config(model: Path) -> tuple[Config, Config]:
    """config.json of a LLaVA model as it stands, and its settings in the words of the original layout."""
    if not model.is_dir():
        raise CheckpointError(f"{model}: not a folder")
    path = model / "config.json"
    language = model / LANGUAGE_ADAPTER
    if adapter_in(language):
        raise CheckpointError(f"{language}: {adapter_advice(language)}")
    if not path.exists() and adapter_in(model):
        raise CheckpointError(f"{model}: {adapter_advice(model)}")
    if not path.exists():
        raise CheckpointError(f"{model}: no config.json; need the folder of a LLaVA model")
    table = read_json(path)
    check_supported(str(path), table)
    own = llava_settings(table)
    beside = {} if own else xtuner_settings(model)
    settings = own or beside
    if not settings:
        raise CheckpointError(
            f"{path}: a model of type {shown(table.get('model_type'))} without LLaVA's settings (mm_*)"
        )
    if is_hugging_face(table) and table.get("model_type") not in HUGGING_FACE:
        raise CheckpointError(
            f"{path}: a model of type {shown(table.get('model_type'))}, need one of {', '.join(HUGGING_FACE)}"
        )
    return Config(str(path), table | beside), Config(str(path), settings)


def tower_settings(model: Path, config: Config, folder: Path | None = None) -> Config:
    """The settings of the tower: of `folder`, of `vision_config`, of a folder that the config names, or
    published.
    """
    if folder is not None:
        return tower_config(folder, None)
    if is_hugging_face(config.table):
        return nested_tower(config)
    beside = tower_folders(model, config.table)
    if beside:
        return tower_config(beside[0], None)
    known = known_tower(config)
    if known is None:
        named = config.get("mm_vision_tower", "vision_tower")
        raise CheckpointError(
            f"{config.where}: mm_vision_tower is {shown(named)}: neither a folder near {model} "
            f"nor one of {', '.join(name for tower in TOWERS for name in tower.published)}"
        )
    return known


def write_vit_config(model: Path, folder: Path) -> Path:
    """Write `folder`/config.json for the image encoder's script, from what `model` says of itself.

    The tower that llava_surgery_v2 left in `model`, llava.clip, must have the shapes it states. Raises
    CheckpointError.
    """
    config, settings = read_llava_config(model)
    tower = tower_settings(model, config)
    params = vision_params(tower, {})
    llava_facts(settings, params)  # refuses what the next step would
    clip = model / "llava.clip"
    if clip.exists():
        with Checkpoint([clip]) as tensors:
            tower_tensors(clip, tensors, params, F16)
    else:
        log.info("%s: no llava.clip to compare the sizes with; llava_surgery_v2.py -C -m writes it", model)
    table = {"model_type": params.family.kind}
    table |= {key: tower.get(key) for key in params.family.defaults}
    table |= {key: settings.get(key) for key in SETTINGS if settings.get(key) is not None}
    text = (json.dumps(table, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    with replacing(path, n_bytes=len(text), inputs=[model / "config.json"]) as file:
        file.write(text)
    log.info("%s: the vision tower as %s says", path, tower.where)
    return path
