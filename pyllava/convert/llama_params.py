"""Hyper-parameters of a language model, from the config of any of its layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoints.json_file import Config, read_json
from .checkpoints.tensor import Tensor
from .errors import CheckpointError, shown
from .families import LLAMA, Family, family_of
from .llava_config import is_hugging_face
from .unsupported import check_supported


@dataclass(frozen=True)
class LlamaParams:
    """`rope_scaling` is (type, factor, original context) or None; `rope_factors` divide the frequencies, one for
    each pair of a head; `tied`: the output shares token_embd.
    """

    family: Family
    n_vocab: int | None  # as the config says; the rows of token_embd decide
    n_ctx: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    head_dim: int
    eps: float
    rope_theta: float
    rope_scaling: tuple[str, float, int | None] | None
    rope_factors: tuple[float, ...] | None
    scales: Mapping[str, float]  # by the file's key
    tied: bool


def read_llama_params(
    folder: Path, tensors: Mapping[str, Tensor], n_ctx: int | None
) -> tuple[LlamaParams, Config]:
    """From config.json (LLaMA, LLaVA, nested text_config), else Meta's params.json; `n_ctx` overrides."""
    if (folder / "config.json").exists():
        config = Config(str(folder / "config.json"), read_json(folder / "config.json"))
        nested = config.sub("text_config")
        if nested is None and is_hugging_face(config.table):
            nested = Config(f"{config.where}: text_config", {})
        if nested is not None and config.get("model_type") == "llava_onevision":
            nested.table = {"model_type": "qwen2", **nested.table}
        if nested is not None:
            nested.defaults = _family(nested).defaults_of(nested.table.get("model_type"))
            said = (config.get("tie_word_embeddings"), nested.get("tie_word_embeddings"))
            params = _from_config(nested, _family(nested), n_ctx)
            return replace(params, tied=_is_tied(said, tensors)), nested
        return _from_config(config, _family(config), n_ctx), config
    if (folder / "params.json").exists():
        config = Config(str(folder / "params.json"), read_json(folder / "params.json"))
        return _from_params(config, tensors, n_ctx), config
    raise CheckpointError(f"{folder}: neither config.json nor params.json, the hyper-parameters are unknown")


def _is_tied(said: tuple[object, object], tensors: Mapping[str, Tensor]) -> bool:
    """What the model and its nested language model say; where they disagree, the checkpoint's output decides."""
    has_output = any(name.endswith("lm_head.weight") for name in tensors)
    return True in said and not (False in said and has_output)


def _family(config: Config) -> Family:
    names = config.get("architectures")
    kinds = [config.get("model_type"), *(names if isinstance(names, list) else ())]
    text = " ".join(str(kind).lower() for kind in kinds if kind is not None)
    family = family_of(text)
    if family is None:
        check_supported(config.where, config.table)
        raise CheckpointError(
            f"{config.where}: a model of type {shown(text)}; only the LLaMA family, Qwen2, Granite and Phi-3 are supported"
        )
    experts = config.get("num_local_experts", "num_experts")
    if experts not in (None, 0, 1):
        raise CheckpointError(
            f"{config.where}: {shown(experts)} experts; mixtures of experts are not supported"
        )
    return family


def _from_config(config: Config, family: Family, n_ctx: int | None) -> LlamaParams:
    n_embd, n_head = (
        config.integer("hidden_size", high=1 << 20),
        config.integer("num_attention_heads", high=4096),
    )
    n_head_kv = n_head if config.get("num_key_value_heads") is None else config.integer("num_key_value_heads")
    if config.get("head_dim") is None and n_embd % n_head:
        raise CheckpointError(f"{config.where}: hidden_size {n_embd} does not divide by {n_head} heads")
    head_dim = n_embd // n_head if config.get("head_dim") is None else config.integer("head_dim", high=65536)
    _check_rotary(config)
    return LlamaParams(
        family=family,
        n_vocab=config.integer("vocab_size") if config.get("vocab_size") is not None else None,
        n_ctx=n_ctx or _context(config),
        n_embd=n_embd,
        n_layer=config.integer("num_hidden_layers", high=512),
        n_head=n_head,
        n_head_kv=_check_heads(config, n_head, n_head_kv, head_dim),
        n_ff=config.integer("intermediate_size", high=1 << 22),
        head_dim=head_dim,
        eps=config.number("rms_norm_eps", high=1.0),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        rope_factors=_rope_factors(config, head_dim),
        scales={key: config.number(name) for key, name in family.scales.items()},
        tied=config.get("tie_word_embeddings") is True,
    )


def _check_heads(config: Config, n_head: int, n_head_kv: int, head_dim: int) -> int:
    if n_head % n_head_kv:
        raise CheckpointError(f"{config.where}: {n_head} heads do not divide by {n_head_kv} key-value heads")
    if head_dim % 2:
        raise CheckpointError(
            f"{config.where}: head dimension {head_dim} is odd, rotary positions need pairs"
        )
    return n_head_kv


def _context(config: Config) -> int:
    if config.get("max_sequence_length", "max_position_embeddings") is None:
        raise CheckpointError(f"{config.where}: the context length is unknown, give it with --ctx")
    return config.integer("max_sequence_length", "max_position_embeddings")


def _rope(config: Config) -> Config:
    """transformers 5 keeps theta and scaling in one table, rope_parameters."""
    return config.sub("rope_parameters") or Config(config.where, {})


def _check_rotary(config: Config) -> None:
    share = _rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor")
    if share not in (None, 1):
        raise CheckpointError(
            f"{config.where}: positions turn {shown(share)} of a head (partial_rotary_factor), need all of it"
        )


def _rope_theta(config: Config) -> float:
    if _rope(config).get("rope_theta") is not None:
        return _rope(config).number("rope_theta")
    return 10000.0 if config.get("rope_theta") is None else config.number("rope_theta")


def _rope_scaling(config: Config) -> tuple[str, float, int | None] | None:
    table = config.sub("rope_scaling") or _rope(config)
    kind = table.get("type", "rope_type")
    if kind in (None, "default", "llama3"):
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{table.where}: positions scaled by {shown(kind)}, only linear, yarn and llama3 are supported"
        )
    original = table.get("original_max_position_embeddings")
    return (
        kind,
        table.number("factor"),
        None if original is None else table.integer("original_max_position_embeddings"),
    )


def _rope_factors(config: Config, head_dim: int) -> tuple[float, ...] | None:
    """Llama 3.1's: waves that are short beside the original context stay, long ones are stretched by the factor,
    and those between by a mixture (transformers' `_compute_llama3_parameters`). GGUF has them as a tensor.
    """
    table = config.sub("rope_scaling") or _rope(config)
    if table.get("type", "rope_type") != "llama3":
        return None
    factor, low, high = (table.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise CheckpointError(
            f"{table.where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}"
        )
    original = table.integer("original_max_position_embeddings")

    theta = _rope_theta(config)

    def stretch(i: int) -> float:
        wavelength = 2 * math.pi * math.pow(theta, 2 * i / head_dim)
        kept = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - kept) / factor + kept)

    return tuple(stretch(i) for i in range(head_dim // 2))


def _from_params(config: Config, tensors: Mapping[str, Tensor], n_ctx: int | None) -> LlamaParams:
    """Meta's layout: the feed-forward width is read off the tensors, the context length must be given."""
    if n_ctx is None:
        raise CheckpointError(
            f"{config.where}: holds no context length, give it with --ctx (4096 for LLaMA 2)"
        )
    first = tensors.get("layers.0.feed_forward.w1.weight")
    if first is None:
        raise CheckpointError(
            f"{config.where}: no layers.0.feed_forward.w1.weight to read the feed-forward width from"
        )
    n_embd, n_head = config.integer("dim", high=1 << 20), config.integer("n_heads", high=4096)
    if n_embd % n_head:
        raise CheckpointError(f"{config.where}: dim {n_embd} does not divide by {n_head} heads")
    n_head_kv = n_head if config.get("n_kv_heads") is None else config.integer("n_kv_heads")
    return LlamaParams(
        family=LLAMA,
        n_vocab=None,  # params.json says -1
        n_ctx=n_ctx,
        n_embd=n_embd,
        n_layer=config.integer("n_layers", high=512),
        n_head=n_head,
        n_head_kv=_check_heads(config, n_head, n_head_kv, n_embd // n_head),
        n_ff=first.n_rows,
        head_dim=n_embd // n_head,
        eps=config.number("norm_eps", high=1.0),
        rope_theta=_rope_theta(config),
        rope_scaling=None,
        rope_factors=None,
        scales={},
        tied=False,
    )


def special_id(config: Config, key: str) -> Any:
    """`bos_token_id` and its like: one number, or the first of a list, or None."""
    value = config.get(key)
    return value[0] if isinstance(value, list) and value else value
