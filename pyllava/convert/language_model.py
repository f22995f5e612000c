"""The language model of a LLaVA (or plain) checkpoint as a GGUF file of its family's architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._mixes import Mix, Plan
from ..formats import F32, FORMATS
from .checkpoints.checkpoint import Checkpoint, checkpoint_files, summary
from .checkpoints.dtypes import FloatArray
from .checkpoints.json_file import Config
from .checkpoints.tensor import Computed, Tensor
from .errors import CheckpointError, shown
from .families import DERIVED, META_BLOCK, META_ENDS, OUTPUT, Family
from .gguf_out import Metadata, OutTensor, write_gguf
from .llama_params import LlamaParams, read_llama_params, special_id
from .mixes import language_plan
from .names import Rule, language_prefix, shape_of
from .script import log
from .special_tokens import SPECIAL
from .tokenizer_files import read_vocabulary


@dataclass(frozen=True)
class Options:
    """The flags of the script; defaults as there."""

    outfile: Path | None = None
    outtype: str = "f16"
    vocab_only: bool = False
    vocab_dir: Path | None = None
    vocab_types: tuple[str, ...] = ("spm", "hfft")
    pad_vocab: bool = False
    skip_unknown: bool = False
    n_ctx: int | None = None
    model_name: str | None = None


def folder_of(model: Path) -> Path:
    """The folder that holds the config of `model`, a folder or a file."""
    return model if model.is_dir() else model.parent


def default_outfile(model: Path, options: Options) -> Path:
    name = "ggml-vocab.gguf" if options.vocab_only else f"ggml-model-{options.outtype}.gguf"
    return options.outfile or folder_of(model) / name


def convert(model: Path, options: Options) -> Path:
    """Write the GGUF file; returns its path. Raises CheckpointError, OutputError, ValueError, OSError."""
    folder = folder_of(model)
    files = [] if options.vocab_only else checkpoint_files(model)
    outfile = default_outfile(model, options)
    with Checkpoint(files) as checkpoint:
        params, config = read_llama_params(folder, checkpoint, options.n_ctx)
        vocabulary = read_vocabulary(options.vocab_dir or folder, options.vocab_types, config_ids(config))
        plan = language_plan(options.outtype, params)
        tensors = (
            [] if options.vocab_only else language_tensors(checkpoint, params, plan, options.skip_unknown)
        )
        n_vocab = tensors[0].shape[0] if tensors else (params.n_vocab or len(vocabulary))
        if params.n_vocab not in (None, n_vocab):
            log.info(
                "config.json says vocab_size %s, token_embd has %d rows: rows count", params.n_vocab, n_vocab
            )
        vocabulary = vocabulary.fitted(n_vocab, pad=options.pad_vocab, drop_added=options.skip_unknown)
        meta = language_metadata(
            options.model_name or folder_of(model.resolve()).name, params, n_vocab, plan.mix
        )
        vocabulary.describe(meta)
        write_gguf(outfile, meta, tensors, inputs=checkpoint.files)
    return outfile


def config_ids(config: Config) -> dict[str, Any]:
    """The special tokens' ids as a config gives them: "bos" and so on."""
    return {name: special_id(config, f"{name}_token_id") for name in SPECIAL}


def language_tensors(
    checkpoint: Mapping[str, Tensor], params: LlamaParams, plan: Plan, skip_unknown: bool
) -> list[OutTensor]:
    """All tensors of the language model, each demanded by name and shape (CONTRACT 1.6, 4.1)."""
    sizes = {
        "d": params.n_embd,
        "q": params.n_head * params.head_dim,
        "k": params.n_head_kv * params.head_dim,
        "f": params.n_ff,
    }
    checkpoint = _cut_apart(checkpoint, params.family, sizes)
    rules = _rules(checkpoint, params)
    unknown = [name for name in checkpoint if name not in rules and not DERIVED.fullmatch(name)]
    meta_layout = "tok_embeddings.weight" in rules
    tensors = []
    for name, rule in rules.items():
        tensor = checkpoint.get(name)
        if tensor is None and rule.optional:
            continue
        if tensor is None:
            raise CheckpointError(f"{shown(name)} is missing; the checkpoint holds: {summary(checkpoint)}")
        sizes.setdefault("V", tensor.n_rows)  # token_embd comes first
        shape = shape_of(rule, sizes)
        if tensor.shape != shape:
            raise CheckpointError(f"{shown(name)}: shape {list(tensor.shape)}, need {list(shape)}")
        tensors.append(_out(tensor, rule, params, plan, meta_layout))
    if params.rope_factors is not None:
        factors = np.array(params.rope_factors, np.float32)
        tensors.append(OutTensor("rope_freqs.weight", Computed("rope_freqs", factors), factors.shape, F32))
    _check_unknown(unknown, skip_unknown)
    _tell_fallbacks(plan)
    return tensors


def _cut_apart(
    checkpoint: Mapping[str, Tensor], family: Family, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """The checkpoint with each fused matrix as those that it consists of."""
    tensors = dict(checkpoint)
    for name, tensor in checkpoint.items():
        for end, parts in family.fused.items():
            if not name.endswith(f".{end}"):
                continue
            heights = [shape_of(family.block[part], sizes)[0] for part in parts]
            if tensor.n_rows != sum(heights):
                raise CheckpointError(
                    f"{shown(name)}: {tensor.n_rows} rows, need {' + '.join(map(str, heights))}"
                )
            del tensors[name]
            start = 0
            for part, height in zip(parts, heights, strict=True):
                new = name.removesuffix(end) + part
                tensors[new] = tensor.part(new, start, start + height)
                start += height
    return tensors


def _rules(checkpoint: Mapping[str, Tensor], params: LlamaParams) -> dict[str, Rule]:
    """Checkpoint name -> rule: of all layers, without an output where that is tied."""
    ends: Mapping[str, Rule]
    block: Mapping[str, Rule]
    if "tok_embeddings.weight" in checkpoint:
        ends, block, layer, prefix, head = META_ENDS, META_BLOCK, "layers", "", "output.weight"
    else:
        found = language_prefix(checkpoint)
        if found is None:
            raise CheckpointError(f"no language model (embed_tokens.weight) among: {summary(checkpoint)}")
        ends, block, layer, prefix = params.family.ends, params.family.block, "layers", found
        heads = (
            prefix.removesuffix("model.") + "lm_head.weight",
            "lm_head.weight",
            prefix + "lm_head.weight",
        )
        head = next((name for name in heads if name in checkpoint), heads[0])
    rules = {prefix + name: rule for name, rule in ends.items()}
    for i in range(params.n_layer):
        for name, rule in block.items():
            rules[f"{prefix}{layer}.{i}.{name}"] = rule._replace(name=f"blk.{i}.{rule.name}")
    # A tied model computes with token_embd even where a stale lm_head lies beside it, as transformers does.
    rules[head] = OUTPUT
    if params.tied:
        del rules[head]
        if head in checkpoint:
            log.info("%s is left out: the output is tied to token_embd", head)
    return rules


def _out(tensor: Tensor, rule: Rule, params: LlamaParams, plan: Plan, meta_layout: bool) -> OutTensor:
    target = FORMATS[plan.tensor_type(rule.name, tensor.shape)]
    turned = rule.name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"))
    if meta_layout or not params.family.paired or not turned:
        return OutTensor(rule.name, tensor, tensor.shape, target)
    return OutTensor(rule.name, tensor, tensor.shape, target, interleave(params.head_dim), params.head_dim)


def interleave(head_dim: int) -> Callable[[FloatArray], FloatArray]:
    """Rows of q and k from Hugging Face's order to that of `llama` in GGUF, one head at a time.

    HF rotates the pairs (i, i + head_dim/2), GGUF the pairs (2i, 2i + 1): row i of the first half goes to 2i,
    row i of the second half to 2i + 1. Works on any whole number of heads: [n * head_dim, n_embd]. (See
    CONTRACT 4.1.)
    """

    def reorder(x: FloatArray) -> FloatArray:
        halves = x.reshape(-1, 2, head_dim // 2, x.shape[-1])
        paired: FloatArray = halves.swapaxes(1, 2).reshape(x.shape)
        return paired

    return reorder


def _check_unknown(unknown: list[str], skip: bool) -> None:
    if not unknown:
        return
    if not skip:
        raise CheckpointError(
            f"Unexpected tensor name: {shown(unknown[0])} (and {len(unknown) - 1} more). "
            f"Use --skip-unknown to ignore it (e.g. LLaVA)"
        )
    log.info("skipped %d tensors that are not the language model's: %s", len(unknown), summary(unknown))


def _tell_fallbacks(plan: Plan) -> None:
    for f in plan.fallbacks:
        log.debug("%s: rows of %d, not %s but %s", f.name, f.n_per_row, f.wanted, f.type)
    if plan.fallbacks:
        log.info(
            "%d matrices get another type than %s, whose blocks do not divide their rows (see --verbose)",
            *(len(plan.fallbacks), plan.mix.name),
        )


def language_metadata(name: str, params: LlamaParams, n_vocab: int, mix: Mix) -> Metadata:
    """The keys of CONTRACT 1.5 but for the tokenizer's."""
    arch = params.family.architecture
    meta = Metadata(arch)
    meta.text("general.type", "model")
    meta.text("general.name", name)
    meta.u32("general.file_type", mix.file_type)
    if FORMATS[mix.base].block > 1:
        meta.u32("general.quantization_version", 2)
    meta.u32(f"{arch}.vocab_size", n_vocab)
    meta.u32(f"{arch}.context_length", params.n_ctx)
    meta.u32(f"{arch}.embedding_length", params.n_embd)
    meta.u32(f"{arch}.block_count", params.n_layer)
    meta.u32(f"{arch}.feed_forward_length", params.n_ff)
    meta.u32(f"{arch}.rope.dimension_count", params.head_dim)
    meta.u32(f"{arch}.attention.head_count", params.n_head)
    meta.u32(f"{arch}.attention.head_count_kv", params.n_head_kv)
    if params.head_dim * params.n_head != params.n_embd:
        meta.u32(f"{arch}.attention.key_length", params.head_dim)
        meta.u32(f"{arch}.attention.value_length", params.head_dim)
    meta.f32(f"{arch}.attention.layer_norm_rms_epsilon", params.eps)
    meta.f32(f"{arch}.rope.freq_base", params.rope_theta)
    for key, value in params.scales.items():
        meta.f32(f"{arch}.{key}", value)
    if params.rope_scaling is not None:
        scaling, factor, original = params.rope_scaling
        meta.text(f"{arch}.rope.scaling.type", scaling)
        meta.f32(f"{arch}.rope.scaling.factor", factor)
        if original is not None:
            meta.u32(f"{arch}.rope.scaling.original_context_length", original)
    return meta


def dump(model: Path) -> Sequence[str]:
    """One line per tensor of a checkpoint: name, type, shape, file."""
    with Checkpoint(checkpoint_files(model)) as checkpoint:
        return [
            f"{shown(t.name, 200)[1:-1]:<60} {t.dtype:<5} {list(t.shape)} {t.file.path.name}"
            for t in checkpoint.values()
        ]
