"""The projector file (mmproj): vision tower and projector in one GGUF that old, new and our own readers run
alike.

Keys and tensors follow CONTRACT 1.2-1.4: every layer is stored, and `clip.vision.feature_layer` names the
hidden state that feeds the projector, so that each reader stops at the layer the model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .._mixes import TYPES
from ..formats import F16, F32, GgmlType
from .checkpoints.checkpoint import Checkpoint, summary
from .checkpoints.tensor import Tensor
from .errors import CheckpointError, shown
from .families import SIGLIP
from .gguf_out import Metadata, OutTensor, matrix_or_f32, write_gguf
from .mixes import OUT_TYPES
from .names import (
    Rule,
    projector_gguf_name,
    projector_name,
    projector_type,
    shape_of,
)
from .script import log
from .vision_params import LlavaFacts, VisionParams, read_llava_facts, read_vision_params, weight_files

# The tensors whose rows count the width of the language model, by kind of projector.
OUTPUT_OF = {
    "linear": "mm.0.weight",
    "mlp": "mm.2.weight",
    "vip": "mm.2.weight",
    "mlp_norm": "mm.3.weight",
    "ldp": "mm.model.mlp.3.weight",
    "ldpv2": "mm.model.mlp.2.weight",
}
INPUT_OF = {
    "linear": "mm.0.weight",
    "mlp": "mm.0.weight",
    "vip": "mm.0.weight",
    "mlp_norm": "mm.0.weight",
    "ldp": "mm.model.mlp.1.weight",
    "ldpv2": "mm.model.mlp.0.weight",
}
_FIRST = (Rule("mm.0.weight", "E D"), Rule("mm.0.bias", "E"))
_TWO = (*_FIRST, Rule("mm.2.weight", "E E"), Rule("mm.2.bias", "E"))
RULES: dict[str, tuple[Rule, ...]] = {  # all tensors of a projector of a kind
    "linear": _FIRST,
    "mlp": _TWO,
    "vip": (Rule("mm.input_norm.weight", "D"), Rule("mm.input_norm.bias", "D"), *_TWO),
    "mlp_norm": (
        *_FIRST,
        Rule("mm.1.weight", "E"),
        Rule("mm.1.bias", "E"),
        Rule("mm.3.weight", "E E"),
        Rule("mm.3.bias", "E"),
        Rule("mm.4.weight", "E"),
        Rule("mm.4.bias", "E"),
    ),
}


_MOBILE_BLOCK = (
    Rule("0.0.weight", "E 1 3 3"),
    Rule("0.1.weight", "E"),
    Rule("0.1.bias", "E"),
    Rule("1.fc1.weight", "U E 1 1"),
    Rule("1.fc1.bias", "U"),
    Rule("1.fc2.weight", "E U 1 1"),
    Rule("1.fc2.bias", "E"),
    Rule("2.0.weight", "E E 1 1"),
    Rule("2.1.weight", "E"),
    Rule("2.1.bias", "E"),
)
RULES["ldp"] = (
    Rule("mm.model.mlp.1.weight", "E D"),
    Rule("mm.model.mlp.1.bias", "E"),
    Rule("mm.model.mlp.3.weight", "E E"),
    Rule("mm.model.mlp.3.bias", "E"),
    *(
        rule._replace(name=f"mm.model.mb_block.{i}.block.{rule.name}")
        for i in (1, 2)
        for rule in _MOBILE_BLOCK
    ),
)
RULES["ldpv2"] = (
    Rule("mm.model.mlp.0.weight", "E D"),
    Rule("mm.model.mlp.0.bias", "E"),
    Rule("mm.model.mlp.2.weight", "E E"),
    Rule("mm.model.mlp.2.bias", "E"),
    Rule("mm.model.peg.0.weight", "E 1 3 3"),
    Rule("mm.model.peg.0.bias", "E"),
)
_SQUEEZED = "mm.model.mb_block.1.block.1.fc1.weight"  # its rows: U


@dataclass(frozen=True)
class Part:
    """Tensors by name, and the path to name in messages."""

    path: Path
    tensors: Mapping[str, Tensor]


def convert(
    clip_folder: Path,
    projector: Path,
    output_folder: Path,
    *,
    outtype: str = "f16",
    wanted_type: str | None = None,
    layout: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Path:
    """Write `mmproj-model-<outtype>.gguf` into `output_folder`; returns its path."""
    if not clip_folder.is_dir():
        raise CheckpointError(f"{clip_folder}: not a folder")
    params = read_vision_params(clip_folder, layout=layout, mean=mean, std=std)
    facts = read_llava_facts(projector, clip_folder, params)
    with Checkpoint(weight_files(clip_folder)) as clip, Checkpoint([projector]) as beside:
        metadata, tensors = projector_plan(
            clip_folder.resolve().name,
            params,
            facts,
            Part(clip_folder, clip),
            Part(projector, beside),
            OUT_TYPES[outtype],
            wanted_type=wanted_type,
        )
        output_folder.mkdir(parents=True, exist_ok=True)
        path = output_folder / f"mmproj-model-{outtype}.gguf"
        write_gguf(path, metadata, tensors, inputs=[*clip.files, *beside.files])
    return path


def projector_plan(
    name: str,
    params: VisionParams,
    facts: LlavaFacts,
    tower: Part,
    projector: Part,
    kind: GgmlType,
    *,
    wanted_type: str | None = None,
) -> tuple[Metadata, list[OutTensor]]:
    """The keys and tensors of the file; every tensor is there and fits, or CheckpointError."""
    width = params.n_embd * len(facts.feature_layers)
    tensors, found_type = projector_tensors(projector.path, projector.tensors, width, kind)
    if wanted_type not in (None, found_type, found_type.removesuffix("_norm")):
        raise CheckpointError(
            f"{projector.path}: a projector of type {found_type}, --projector-type says {wanted_type}"
        )
    _check_newline(projector.path, any(tensor.name == "model.image_newline" for tensor in tensors), facts)
    tensors += tower_tensors(tower.path, tower.tensors, params, kind)
    return projector_metadata(name, params, facts, found_type, kind), tensors


def _check_newline(path: Path, newline: bool, facts: LlavaFacts) -> None:
    """Refuses a newline without resolutions, and the reverse: LLaVA-1.6 has both, LLaVA-1.5 neither."""
    if facts.pinpoints and not newline:
        raise CheckpointError(f"{path}: no model.image_newline, which a model with {facts.merge_type} needs")
    if newline and not facts.pinpoints and facts.merge_type is None:
        raise CheckpointError(
            f"{path}: model.image_newline is LLaVA-1.6's, but no config.json beside it tells "
            f"image_grid_pinpoints and mm_patch_merge_type"
        )


def projector_tensors(
    path: Path, projector: Mapping[str, Tensor], width: int, kind: GgmlType
) -> tuple[list[OutTensor], str]:
    """The projector's tensors to write and its type; matrices in `kind`, the rest in f32. `width`: of features."""
    renamed = {new: tensor for name, tensor in projector.items() if (new := projector_name(name))}
    table = {projector_gguf_name(name): tensor for name, tensor in renamed.items()}
    found_type = projector_type(name for name in table if name.startswith("mm."))
    if found_type is None:
        raise CheckpointError(
            f"{path}: no projector of a known type ({', '.join(OUTPUT_OF)}) among: {summary(projector)}"
        )
    if len(table) != len(projector):
        log.info("%s: %d tensors that belong to no projector are left out", path, len(projector) - len(table))
    _check_projector(path, table, found_type, width)
    tensors = []
    for name, tensor in sorted(table.items()):
        shape = tuple(n for n in tensor.shape if n != 1) or (1,)  # a 1x1 convolution becomes a matrix
        wide = len(tensor.shape) in (2, 4)
        tensors.append(OutTensor(name, tensor, shape, matrix_or_f32(shape, kind) if wide else F32))
    return tensors, found_type


def _check_projector(path: Path, table: Mapping[str, Tensor], found_type: str, width: int) -> None:
    first, last = table.get(INPUT_OF[found_type]), table.get(OUTPUT_OF[found_type])
    if first is None or last is None:
        raise CheckpointError(
            f"{path}: a projector of type {found_type} without {INPUT_OF[found_type]}: {summary(table)}"
        )
    if first.shape[1:] != (width,):
        raise CheckpointError(
            f"{path}: {first.name}: shape {list(first.shape)}, the tower gives rows of {width}; "
            f"is this the right vision tower?"
        )
    squeezed = table.get(_SQUEEZED)
    sizes = {"D": width, "E": last.shape[0], "U": squeezed.shape[0] if squeezed else 0}
    if "model.image_newline" in table and table["model.image_newline"].shape != (sizes["E"],):
        raise CheckpointError(f"{path}: model.image_newline: need a vector of {sizes['E']}")
    rules = RULES[found_type]
    for rule in rules:
        _take(path, table, rule.name, rule, sizes)
    extra = set(table) - {rule.name for rule in rules} - {"model.image_newline"}
    if extra:
        raise CheckpointError(
            f"{path}: unexpected tensors beside the {found_type} projector: {summary(extra)}"
        )


def _take(path: Path, table: Mapping[str, Tensor], name: str, rule: Rule, sizes: Mapping[str, int]) -> Tensor:
    """`table[name]`, in the shape that the rule demands."""
    tensor = table.get(name)
    if tensor is None:
        raise CheckpointError(f"{path}: {shown(name)} is missing")
    if tensor.shape != shape_of(rule, sizes):
        raise CheckpointError(
            f"{path}: {shown(name)}: shape {list(tensor.shape)}, need {list(shape_of(rule, sizes))}"
        )
    return tensor


def tower_tensors(
    folder: Path, clip: Mapping[str, Tensor], params: VisionParams, kind: GgmlType
) -> list[OutTensor]:
    """The tower's tensors, each demanded by name and shape; what is left must be known as unused."""
    end = "embeddings.patch_embedding.weight"
    prefixes = [name[: -len(end)] for name in clip if name.endswith(end)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{folder}: no vision tower ({end}) among: {summary(clip)}")
    prefix = prefixes[0]
    has_class = "embeddings.class_embedding" in params.family.ends
    n_positions = (params.image_size // params.patch_size) ** 2 + int(has_class)
    sizes = {"D": params.n_embd, "F": params.n_ff, "P": params.patch_size, "T": n_positions}
    plan = {prefix + name: rule for name, rule in params.family.ends.items()}
    for i in range(params.n_layer):
        for name, rule in params.family.block.items():
            plan[f"{prefix}encoder.layers.{i}.{name}"] = rule._replace(name=f"v.blk.{i}.{rule.name}")
    tensors = []
    for name, rule in plan.items():
        if rule.optional and name not in clip:
            continue
        tensor = _take(folder, clip, name, rule, sizes)
        tensors.append(OutTensor(rule.name, tensor, tensor.shape, _tower_type(rule.name, tensor.shape, kind)))
    _check_left_over(folder, [name for name in clip if name not in plan], params.family.unused)
    return tensors


def stored_layers(tower: Part, params: VisionParams, facts: LlavaFacts) -> int:
    """Layers that a tower's checkpoint holds. Those of lmms-lab lack SigLIP's last, which their config counts and
    the model does not read.
    """
    last = params.n_layer - 1
    needed = params.family is not SIGLIP or last < max(facts.feature_layers)
    is_there = any(f"encoder.layers.{last}." in name for name in tower.tensors)
    return params.n_layer if needed or is_there else last


def _tower_type(name: str, shape: tuple[int, ...], kind: GgmlType) -> GgmlType:
    """Matrices in `kind`, vectors in f32. The patch convolution is f16 always, older readers need it so;
    positions are read row by row and small, so they are not quantised.
    """
    if name == "v.patch_embd.weight":
        return F16
    if name == "v.position_embd.weight" and kind.block > 1:
        return F16
    return matrix_or_f32(shape, kind) if len(shape) == 2 else F32


def _check_left_over(folder: Path, names: list[str], unused: re.Pattern[str]) -> None:
    unknown = [name for name in names if not unused.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} tensors that config.json does not explain: {summary(unknown)}"
        )
    if names:
        log.debug("left out, of no use here: %s", summary(names))


def projector_metadata(
    name: str, params: VisionParams, facts: LlavaFacts, found_type: str, kind: GgmlType
) -> Metadata:
    """The keys of CONTRACT 1.2, those that old readers demand included."""
    meta = Metadata("clip")
    meta.text("general.type", "mmproj")
    meta.flag("clip.has_text_encoder", False)
    meta.flag("clip.has_vision_encoder", True)
    meta.flag("clip.has_llava_projector", True)
    meta.u32("general.file_type", TYPES[str(kind)].file_type)
    meta.text("general.name", name or "clip")
    meta.text("general.description", "image encoder for LLaVA")
    # Readers tell mlp_norm from mlp by its tensors.
    meta.text("clip.projector_type", "mlp" if found_type == "mlp_norm" else found_type)
    meta.u32("clip.vision.image_size", params.image_size)
    meta.u32("clip.vision.patch_size", params.patch_size)
    meta.u32("clip.vision.embedding_length", params.n_embd)
    meta.u32("clip.vision.feed_forward_length", params.n_ff)
    meta.u32("clip.vision.projection_dim", params.projection_dim)
    meta.u32("clip.vision.attention.head_count", params.n_head)
    meta.f32("clip.vision.attention.layer_norm_epsilon", params.eps)
    meta.u32("clip.vision.block_count", params.n_layer)
    meta.i32s("clip.vision.feature_layer", facts.feature_layers)
    _add_llava_facts(meta, facts)
    meta.f32s("clip.vision.image_mean", params.mean)
    meta.f32s("clip.vision.image_std", params.std)
    meta.flag("clip.use_gelu", params.activation == "gelu")
    if params.activation == "silu":
        meta.flag("clip.use_silu", True)
    return meta


def _add_llava_facts(meta: Metadata, facts: LlavaFacts) -> None:
    if facts.pinpoints:
        meta.i32s("clip.vision.image_grid_pinpoints", facts.pinpoints)
    if facts.merge_type and (facts.pinpoints or "unpad" not in facts.merge_type):
        meta.text("clip.vision.mm_patch_merge_type", facts.merge_type)
    if facts.aspect_ratio:
        meta.text("clip.vision.image_aspect_ratio", facts.aspect_ratio)
    if facts.crop_resolution:
        meta.u32("clip.vision.image_crop_resolution", facts.crop_resolution)
    if facts.split_resolution:
        meta.u32("clip.vision.image_split_resolution", facts.split_resolution)
    if facts.projector_text:
        meta.text("clip.vision.mm_projector_type", facts.projector_text)
