"""Which number format each tensor of a language model gets: one for all matrices, or the mix of a quantised
type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .dtypes import F32, KINDS, OUT_TYPES, GgmlType
from .errors import ConvertError
from .gguf_out import matrix_or_f32
from .llama_params import LlamaParams
from .script import log

# Written with the library's help, as `pyllava-cli quantize` does (pyllava.quantize.TYPES).
LIBRARY_TYPES = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)
MIX_NAMES = (*OUT_TYPES, *LIBRARY_TYPES)


@dataclass(frozen=True)
class Mix:
    """`type_of` takes a GGUF name and a row-major shape; `file_type` is `general.file_type`.

    `replaced`: the tensors whose rows the wanted type's blocks do not divide, so far.
    """

    name: str
    file_type: int
    quantized: bool
    type_of: Callable[[str, tuple[int, ...]], GgmlType]
    replaced: list[str] = field(default_factory=list)


def uniform(kind: GgmlType) -> Mix:
    """Every matrix in `kind`; f16 where its blocks do not divide the rows."""

    def type_of(name: str, shape: tuple[int, ...]) -> GgmlType:
        target = matrix_or_f32(shape, kind)
        if target is not F32 and target is not kind:
            log.info("%s: rows of %d do not divide into %s blocks, kept as f16", name, shape[-1], kind.name)
        return target

    return Mix(kind.name, kind.file_type, kind.block > 1, type_of)


def mix_named(name: str, params: LlamaParams) -> Mix:
    """One of MIX_NAMES, for a model of these sizes. Raises ConvertError where the library is needed and
    missing.
    """
    if name in OUT_TYPES:
        return uniform(OUT_TYPES[name])
    try:
        from pyllava.quantize import TYPES, Plan
    except ImportError as error:
        raise ConvertError(f"--outtype {name} needs the compiled library: {error}") from None
    plan = Plan(
        name, n_layer=params.n_layer, n_head=params.n_head, n_head_kv=params.n_head_kv, tied=params.tied
    )
    replaced: list[str] = []

    def type_of(tensor: str, shape: tuple[int, ...]) -> GgmlType:
        n_before = len(plan.fallbacks)
        target = KINDS[plan.tensor_type(tensor, shape).lower()]
        for fallback in plan.fallbacks[n_before:]:
            replaced.append(tensor)
            log.debug("%s: rows of %d, not %s but %s", tensor, shape[-1], fallback.wanted, fallback.type)
        return target

    return Mix(name, TYPES[name].file_type, True, type_of, replaced)
