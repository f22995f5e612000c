"""The number formats that the converters write: plain ones, and the mixes of `pyllava-cli quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._mixes import MIXES, Plan
from ..formats import BF16, F16, F32, Q8_0
from .errors import ConvertError

if TYPE_CHECKING:
    from .llama_params import LlamaParams

OUT_TYPES = {str(kind): kind for kind in (F32, F16, BF16, Q8_0)}
"""What is written without the compiled library, one type for all matrices."""
MIX_NAMES = tuple(mix.name for mix in MIXES)


def language_plan(name: str, params: LlamaParams) -> Plan:
    """The types of a language model of these sizes, `name` one of MIX_NAMES.

    Raises ConvertError where the library is needed and missing.
    """
    if name not in OUT_TYPES:
        try:
            import pyllava.quantize  # noqa: F401
        except ImportError as error:
            raise ConvertError(f"--outtype {name} needs the compiled library: {error}") from None
    return Plan(
        name, n_layer=params.n_layer, n_head=params.n_head, n_head_kv=params.n_head_kv, tied=params.tied
    )
