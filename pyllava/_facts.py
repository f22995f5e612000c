"""What the metadata and the tensors of a GGUF file say about the model in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gguf import GgufFile


def facts_of(file: GgufFile, *, count_tokens: bool = True) -> dict[str, Any]:
    """Numbers and names of a language model or a projector; what a file does not tell is left out.

    `count_tokens`: False leaves out the size of the vocabulary, for which all of its texts are read.
    """
    shapes = {tensor.name: tuple(tensor.shape) for tensor in file.tensors}
    architecture = str(file.metadata.get("general.architecture", "unknown"))
    is_projector = architecture == "clip"
    facts = (
        _projector(file.metadata, shapes)
        if is_projector
        else _language_model(file.metadata, architecture, count_tokens)
    )
    return {key: value for key, value in facts.items() if value is not None}


def _language_model(metadata: Mapping[str, Any], architecture: str, count_tokens: bool) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens") if count_tokens else None
    return {
        "kind": "language model",
        "architecture": architecture,
        "layers": metadata.get(f"{architecture}.block_count"),
        "width": metadata.get(f"{architecture}.embedding_length"),
        "heads": metadata.get(f"{architecture}.attention.head_count"),
        "KV heads": metadata.get(f"{architecture}.attention.head_count_kv"),
        "context": metadata.get(f"{architecture}.context_length"),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
    }


def _projector(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    image_size, patch_size = (
        _count(metadata, f"clip.vision.{name}") for name in ("image_size", "patch_size")
    )
    n_stored = len({name.split(".")[2] for name in shapes if name.startswith("v.blk.")})
    is_siglip = "v.class_embd" not in shapes and "v.patch_embd.bias" in shapes
    return {
        "kind": "projector",
        "projector": _projector_kind(metadata, shapes),
        "tower": "siglip" if is_siglip else "clip",
        "image size": image_size,
        "patch size": patch_size,
        "patches": (image_size // patch_size) ** 2 if image_size and patch_size else None,
        "layers stored": n_stored,
        "layers run": layers_run(metadata, n_stored, is_siglip=is_siglip),
        "width": metadata.get("clip.vision.embedding_length"),
        "output width": _output_width(shapes),
        "merge": metadata.get("clip.vision.mm_patch_merge_type"),
    }


def _projector_kind(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """As projector.c decides: of some kinds the files say mlp."""
    named = metadata.get("clip.projector_type") or metadata.get("clip.vision.projector_type")
    if named not in (None, "", "mlp"):
        return str(named)
    kind = "mlp_norm" if "mm.3.weight" in shapes else "mlp" if "mm.2.weight" in shapes else "linear"
    return kind if named == kind else f"{kind} (the file does not say so)"


def layers_run(metadata: Mapping[str, Any], n_stored: int, *, is_siglip: bool = False) -> int:
    """As vision_hparams.c decides: a file without a feature layer holds the layers wanted, or a whole tower."""
    n_layer = _count(metadata, "clip.vision.block_count") or n_stored
    features: Any = metadata.get("clip.vision.feature_layer")
    features = features.tolist() if hasattr(features, "tolist") else features
    if isinstance(features, list) and features and all(isinstance(layer, int) for layer in features):
        return max(layer if layer >= 0 else n_layer for layer in features)
    return n_layer - 1 if n_layer in ((27,) if is_siglip else (24, 32)) else n_layer


def _count(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    return value if isinstance(value, int) else 0


def _output_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    ends = ("mm.3.weight", "mm.2.weight", "mm.0.weight", "mm.model.mlp.3.weight", "mm.model.mlp.2.weight")
    for name in ends:
        if name in shapes:
            return shapes[name][0]
    return None
