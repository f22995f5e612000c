"""``pyllava-cli quantize IN OUT TYPE``: a language model or projector with fewer bits per weight."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import TYPE_CHECKING

from .._mixes import TYPES
from .._terminal import duration, long_stages, say
from .options import PROGRAM, Parser

if TYPE_CHECKING:
    from ..quantize import Report

_DESCRIPTION = """\
Write a language model or a projector again with fewer bits per weight.

types, the smaller the further down:
  f32, f16, bf16                             floating point
  q8_0, q6_k                                 hardly to be told from f16
  q5_k_m (q5_k), q5_k_s, q5_1, q5_0          a little smaller
  q4_k_m (q4_k), q4_k_s, q4_1, q4_0          the usual choice
  q3_k_l, q3_k_m (q3_k), q3_k_s, q2_k        visibly worse
"""


def quantize_command(argv: list[str]) -> None:
    """Quantise as the command line says; every failure is an exception."""
    parser = Parser(prog=f"{PROGRAM} quantize", description=_DESCRIPTION)
    parser.add_argument("source", metavar="IN", help="GGUF file; the first one of a split model")
    parser.add_argument("target", metavar="OUT", help="file to write, in a folder that exists")
    parser.add_argument("type", metavar="TYPE", type=str.lower, choices=TYPES, help="one of the types above")
    parser.add_argument("-t", "--threads", metavar="N", type=int, help="threads (default: one per core)")
    parser.add_argument("--pure", action="store_true", help="one type for all matrices, no mix")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there already")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="name every tensor that fell back")
    options = parser.parse(argv)
    from ..quantize import quantize

    threads = options.threads if options.threads and options.threads > 0 else None
    with long_stages() as progress:
        report = quantize(
            options.source,
            options.target,
            options.type,
            n_threads=threads,
            pure=options.pure,
            overwrite=options.force,
            progress=progress,
        )
    if options.json:
        print(
            json.dumps({**dataclasses.asdict(report), "bits_per_weight": report.bits_per_weight}, default=str)
        )
    else:
        say("\n".join(_summary(report, options.verbose)))


def _summary(report: Report, verbose: bool) -> list[str]:
    before = 8 * report.n_bytes_before / report.n_weights
    types = ", ".join(f"{n} {name}" for name, n in report.types.items())
    lines = [
        f"{report.source}: {report.n_bytes_before / 1e6:.1f} MB, {before:.2f} bits per weight",
        f"{report.target}: {report.n_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits per weight, {report.type}",
        f"tensors: {types}; in {duration(report.seconds)}",
    ]
    if report.n_requantized:
        lines.append(
            f"note: {report.n_requantized} tensors were quantised before: from f16 or f32 they would lose less"
        )
    kinds = collections.Counter((f.wanted, f.type, f.n_per_row) for f in report.fallbacks)
    for (wanted, kind, n_per_row), n in kinds.items():
        lines.append(f"note: {n} tensors with rows of {n_per_row} are {kind}, {wanted} does not divide those")
    if verbose:
        lines += [f"  {f.name}: {f.type} instead of {f.wanted}" for f in report.fallbacks]
    return lines
