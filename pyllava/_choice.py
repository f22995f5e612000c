"""Which files of a folder or a repository are the model: one language model and its projector, of the best quantisation.

The rule is the same wherever the files lie: what their headers say comes before their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._gguf_names import model_of, quant_of, spelled, stem_of
from .errors import ModelMismatchError

_OF_PROJECTORS = ("F16", "BF16", "F32", "Q8_0")
"""The best first: f32 holds nothing that a tower published in 16 bits lacks, and takes twice the memory."""
_SAME = ("projector", "tower", "image size", "patch size", "layers run", "merge", "output width")
_SHOWN = 8  # files that a message names
_SAME_LANGUAGE = ("architecture", "layers", "width")


@dataclass(frozen=True)
class Candidate:
    """A GGUF file that may be a part of a model; `n_bytes` counts all files of a split one."""

    name: str
    n_bytes: int
    facts: Mapping[str, Any]
    """What its header tells (``_facts.facts_of``); empty where it was not read."""

    @property
    def quant(self) -> str:
        return quant_of(self.name)


def language_model(
    place: str, found: Sequence[Candidate], quant: str | None, fits: Callable[[Candidate], bool]
) -> tuple[Candidate, str]:
    """The one of `found` that is meant, and why, in words ("" where there was no choice).

    With `quant`, that quantisation; else the largest that `fits` in memory, f32 only where there is nothing else, or the
    smallest where none fits. Raises ModelMismatchError where several models lie there, or none of that quantisation.
    """
    several = found
    if quant is not None:
        found = _of_quant(place, found, quant)
    _refuse_different(place, found, "language models", _SAME_LANGUAGE)
    if quant is not None:
        found = _of_usual_name(found, several)
    if len(found) == 1:
        return found[0], ""
    by_size = sorted(found, key=lambda one: (one.quant != "F32", one.n_bytes))
    fitting = [one for one in by_size if fits(one)]
    best = (fitting or sorted(found, key=lambda one: one.n_bytes)[:1])[-1]
    others = ", ".join(sorted({one.quant.lower() or one.name for one in several if one is not best}))
    why = "the best that fits in memory" if fitting else "the smallest, and memory does not hold it"
    return best, f"{best.name}: {why}; there are {others}, too"


def _of_quant(place: str, found: Sequence[Candidate], quant: str) -> Sequence[Candidate]:
    """The exact name; else ``q4_k`` finds ``Q4_K_M``, or what else begins so."""
    wanted = spelled(quant)
    ways = (wanted.__eq__, f"{wanted}_M".__eq__, lambda one: one.startswith(wanted))
    named = next(filter(None, ([one for one in found if way(one.quant)] for way in ways)), [])
    if not named:
        there = ", ".join(sorted({one.quant.lower() or one.name for one in found})) or "no language model"
        raise ModelMismatchError(f"{place}: no file of {wanted.lower()}; there are: {there}")
    return named


def _of_usual_name(found: Sequence[Candidate], several: Sequence[Candidate]) -> Sequence[Candidate]:
    """Of files of one quantisation, published twice, the one that is named as most others are."""
    stems = [stem_of(one.name) for one in several]
    return [max(found, key=lambda one: (stems.count(stem_of(one.name)), one.name))]


def projector(place: str, found: Sequence[Candidate], width: object) -> tuple[Candidate | None, str]:
    """The projector among `found` for a language model of `width`, and why ("" where there was no choice).

    Of several number formats of one projector: f16, bf16, f32, q8_0, the largest of others. Raises ModelMismatchError where
    different ones fit. One that does not fit is taken where it is the only one: loading it tells the reason.
    """
    fitting = [one for one in found if one.facts.get("output width", width) == width] or list(found)
    _refuse_different(place, fitting, "projector (mmproj) files", _SAME)
    if len(fitting) < 2:
        return (fitting[0] if fitting else None), ""
    order = {name: i for i, name in enumerate(_OF_PROJECTORS)}
    best = min(fitting, key=lambda one: (order.get(one.quant, len(order)), -one.n_bytes))
    return best, f"{best.name} of {len(fitting)} number formats of the projector"


def _refuse_different(place: str, found: Sequence[Candidate], what: str, same: Sequence[str]) -> None:
    """Files that differ in more than their number format: nothing tells which of them is meant."""
    kinds = {(model_of(one.name), *(str(one.facts.get(key)) for key in same)) for one in found}
    if len(kinds) > 1:
        raise ModelMismatchError(f"{place}: {len(found)} {what} ({_names(found)}), need one: name the file")


def _names(found: Sequence[Candidate]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(one.name for one in found[:_SHOWN]) + more
