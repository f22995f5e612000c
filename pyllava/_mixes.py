"""The number format of each tensor of a file: the types of ``pyllava-cli quantize`` and their layer rules.

The mixes are those that K-quantised files of language models have always had, so that a file made here and
one made by llama.cpp's tool agree tensor by tensor: the projections that the answer depends on most get more
bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from .formats import FORMATS


@dataclass(frozen=True)
class Layer:
    """Layer `i` of `n`; `n_gqa` query heads share one KV head."""

    i: int
    n: int
    n_gqa: int


Rule: TypeAlias = Callable[[Layer], str]


def _always(kind: str) -> Rule:
    return lambda layer: kind


def _first(count: int, kind: str, rest: str) -> Rule:
    return lambda layer: kind if layer.i < count else rest


def _first_part(divisor: int, kind: str, rest: str) -> Rule:
    return lambda layer: kind if layer.i < layer.n // divisor else rest


def _more(kind: str, rest: str) -> Rule:
    """`kind` in the first and the last eighth and in every third layer between."""

    def rule(layer: Layer) -> str:
        i, eighth = layer.i, layer.n // 8
        return kind if i < eighth or i >= 7 * layer.n // 8 or (i - eighth) % 3 == 2 else rest

    return rule


@dataclass(frozen=True)
class Mix:
    """A type that a file can be quantised to: `base` for the matrices, `rules` for those named otherwise.

    `file_type` is the number that ``general.file_type`` gives it (llama_ftype). Formats are names of FORMATS.
    """

    name: str
    base: str
    file_type: int
    output: str = ""
    rules: Mapping[str, Rule] = field(default_factory=dict)


MIXES = (
    Mix("f32", "F32", 0),
    Mix("f16", "F16", 1),
    Mix("bf16", "BF16", 32),
    Mix("q8_0", "Q8_0", 7),
    Mix("q4_0", "Q4_0", 2, "Q6_K"),
    Mix("q4_1", "Q4_1", 3, "Q6_K"),
    Mix("q5_0", "Q5_0", 8, "Q6_K"),
    Mix("q5_1", "Q5_1", 9, "Q6_K"),
    Mix(
        "q2_k",
        "Q2_K",
        10,
        "Q6_K",
        {
            "attn_v": lambda layer: "Q4_K" if layer.n_gqa >= 4 else "Q3_K",
            "ffn_down": _always("Q3_K"),
            "attn_output": _always("Q3_K"),
        },
    ),
    Mix("q3_k_s", "Q3_K", 11, "Q6_K"),
    Mix(
        "q3_k_m",
        "Q3_K",
        12,
        "Q6_K",
        {
            "attn_v": _first(2, "Q5_K", "Q4_K"),
            "ffn_down": _first_part(16, "Q5_K", "Q4_K"),
            "attn_output": _always("Q4_K"),
            "attn_qkv": _always("Q4_K"),
        },
    ),
    Mix(
        "q3_k_l",
        "Q3_K",
        13,
        "Q6_K",
        {
            "attn_v": _always("Q5_K"),
            "ffn_down": _always("Q5_K"),
            "attn_output": _always("Q5_K"),
            "attn_qkv": _always("Q4_K"),
        },
    ),
    Mix(
        "q4_k_s",
        "Q4_K",
        14,
        "Q6_K",
        {"attn_v": _first(4, "Q5_K", "Q4_K"), "ffn_down": _first_part(8, "Q5_K", "Q4_K")},
    ),
    Mix(
        "q4_k_m",
        "Q4_K",
        15,
        "Q6_K",
        {
            "attn_v": _more("Q6_K", "Q4_K"),
            "ffn_down": _more("Q6_K", "Q4_K"),
            "attn_qkv": _always("Q5_K"),
        },
    ),
    Mix("q5_k_s", "Q5_K", 16, "Q6_K"),
    Mix(
        "q5_k_m",
        "Q5_K",
        17,
        "Q6_K",
        {
            "attn_v": _more("Q6_K", "Q5_K"),
            "ffn_down": _more("Q6_K", "Q5_K"),
            "attn_qkv": _always("Q6_K"),
        },
    ),
    Mix("q6_k", "Q6_K", 18, "Q6_K"),
)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# Every name that is accepted, in lower case.
TYPES: dict[str, Mix] = {mix.name: mix for mix in MIXES}
TYPES.update({alias: TYPES[name] for alias, name in _ALIASES.items()})

# The replacement of a type whose blocks do not divide the rows; it may be replaced in turn.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def mix_named(name: str) -> Mix:
    """The mix of this name, in any case. Raises ValueError where there is none."""
    mix = TYPES.get(name.lower())
    if mix is None:
        raise ValueError(f"type {name!r}, need one of {', '.join(TYPES)}")
    return mix


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows of `n_per_row` elements the type `wanted` cannot divide."""

    name: str
    wanted: str
    type: str
    n_per_row: int


class _Plan:
    def __init__(self, type_name: str) -> None:
        self.mix = mix_named(type_name)
        self.fallbacks: list[Fallback] = []

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it is a matrix that the type is meant for; every other tensor stays as it is."""
        raise NotImplementedError

    def _wanted(self, name: str) -> str:
        raise NotImplementedError

    def tensor_type(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of a tensor, ``"Q4_K"``; `shape` is row-major. "F32" for vectors and norms.

        Where the blocks do not divide the rows, another type that does, and an entry in `fallbacks`.
        """
        if not self.quantizes(name, shape):
            return "F32"
        wanted = self._wanted(name)
        found = next(
            kind for kind in (wanted, _FALLBACKS.get(wanted, "F16"), "F16") if _fits(kind, shape[-1])
        )
        if found != wanted:
            self.fallbacks.append(Fallback(name, wanted, found, shape[-1]))
        return found


def _fits(kind: str, n_per_row: int) -> bool:
    return n_per_row % FORMATS[kind].block == 0


# Matrices that stay as they are: too small to matter, or read row by row.
_KEPT = re.compile(r"norm\.weight$|ffn_gate_inp|position_embd|token_types")
_PART = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|attn_output|ffn_down)(_exps)?\.weight$")


class Plan(_Plan):
    """The types of a language model's tensors; `tied` where it has no output.weight of its own.

    `pure` leaves the rules out: the base type for every matrix.
    """

    def __init__(
        self, type_name: str, *, n_layer: int, n_head: int, n_head_kv: int, tied: bool, pure: bool = False
    ) -> None:
        super().__init__(type_name)
        self._n_layer = n_layer
        self._n_gqa = n_head // max(n_head_kv, 1)
        self._output = "token_embd.weight" if tied else "output.weight"
        self._is_70b = n_layer == 80 and n_head != n_head_kv
        self._pure = pure

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and name.endswith(".weight") and not _KEPT.search(name)

    def _wanted(self, name: str) -> str:
        mix = self.mix
        if self._pure:
            return mix.base
        if name == self._output:
            return mix.output or mix.base
        part = _PART.match(name)
        if part is None:
            return mix.base
        rule = mix.rules.get(part[2])
        kind = rule(Layer(int(part[1]), self._n_layer, self._n_gqa)) if rule else mix.base
        if part[2] == "attn_v" and self._is_70b and kind in ("Q3_K", "Q4_K"):
            return "Q5_K"  # a small matrix there, and shared by many heads
        return kind


class ProjectorPlan(_Plan):
    """The types of a vision tower's and projector's tensors: every matrix gets the base type.

    Patch embeddings stay as they are; position embeddings, which are added and not multiplied, become f16 at
    least.
    """

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and name.endswith(".weight") and not re.search("norm|patch_embd", name)

    def _wanted(self, name: str) -> str:
        base = self.mix.base
        return "F16" if "position_embd" in name and base != "F32" else base
