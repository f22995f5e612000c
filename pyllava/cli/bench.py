"""``pyllava-cli bench``: how fast a model is on this machine, stage by stage."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from .._terminal import Console, counted
from .hub import settle
from .option_kinds import adder
from .options import PROGRAM, Parser, add_devices, add_files, check_pairs

_DESCRIPTION = """\
Measure loading, image encoding, prefill and decoding; medians of --repeat runs after one that is not counted.
Tokens and picture are random numbers: speed does not depend on them.
"""


def bench(argv: list[str]) -> None:
    """Measure as the command line says; every failure is an exception."""
    parser = _parser()
    options = parser.parse(argv)
    check_pairs(options, parser)
    settle(options, Console(quiet=False))
    from .bench_run import Bench

    result = Bench(options).run()
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{result['devices']}\n{_table(result)}")


def _parser() -> Parser:
    parser = Parser(prog=f"{PROGRAM} bench", description=_DESCRIPTION)
    add = parser.add_argument
    add(
        "-p",
        "--prompt-tokens",
        metavar="N",
        type=_count,
        default=512,
        help="tokens of the prompt (default: 512)",
    )
    add("-n", "--predict", metavar="N", type=_count, default=32, help="tokens to decode (default: 32)")
    add("--batch", metavar="N,N", type=_counts, default=(1,), help="sequences decoded together (default: 1)")
    add(
        "--image-size",
        metavar="WxH",
        type=_size,
        default=(336, 336),
        help="of the picture (default: 336x336)",
    )
    add(
        "-b",
        "--batch-size",
        metavar="N",
        type=_count,
        default=1024,
        help="tokens per prefill step (default: 1024)",
    )
    add("-t", "--threads", metavar="N", type=_count, default=0, help="threads (default: one per core)")
    add(
        "--precision",
        metavar="NAME",
        choices=("fast", "exact"),
        default="fast",
        help="fast (default) or exact",
    )
    add("--repeat", metavar="N", type=_count, default=3, help="runs of each stage (default: 3)")
    add("--json", action="store_true", help="one JSON object on stdout")
    add_files(adder(parser, "model"))
    add_devices(parser)
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, need a number from 1 to 999999")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r}, need WIDTHxHEIGHT")
    return _count(width), _count(height)


def _table(result: dict[str, Any]) -> str:
    lines: list[tuple[str, float, str]] = [("load", result["load_s"], "s")]
    if "encode_s" in result:
        lines.append(
            (
                f"encode ({counted(result['views'], 'view')}, {result['image_tokens']} tokens)",
                result["encode_s"],
                "s",
            )
        )
    lines += [
        ("prefill", result["prefill_tok_s"], "tokens/s"),
        ("decode", result["decode_tok_s"], "tokens/s"),
    ]
    lines += [
        (f"decode, {k} at once", v, "tokens/s") for k, v in result["decode_batch_tok_s"].items() if k != "1"
    ]
    if "ttft_s" in result:
        lines.append(("first token, with image", result["ttft_s"], "s"))
    if result["peak_anon_bytes"] is not None:
        lines.append(("memory besides the files", result["peak_anon_bytes"] / 2**20, "MiB"))
    return "\n".join(f"{name:<34}{value:>12.{3 if value < 10 else 1}f} {unit}" for name, value, unit in lines)
