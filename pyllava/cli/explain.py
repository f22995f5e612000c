"""``pyllava-cli explain IMAGE QUESTION -o heat.png``: which places of a picture an answer depends on."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._named_pictures import found
from .._part_file import replacing
from .._terminal import DEMO_NOTE, Console, library_log, printable
from .hub import settle
from .option_kinds import COUNT, adder
from .options import (
    PROGRAM,
    Parser,
    add_devices,
    add_model,
    add_output,
    add_prompt,
    check_pairs,
    model_arguments,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..heat_map import HeatMap

_DESCRIPTION = """\
Draw over a picture which places an answer depends on: what the model sees of a window is replaced by the picture's mean, and the
answer's log-probability falls. Each window costs about half a prompt; what all of them cost is said before.
"""


def explain(argv: list[str]) -> None:
    """Draw as the command line says; every failure is an exception."""
    parser = _parser()
    options = parser.parse(argv)
    check_pairs(options, parser)
    if options.output is None and not options.json:
        parser.error("need -o FILE for the drawing, or --json for the numbers alone")
    from ..images import load_image, open_source

    picture = load_image(open_source(found(options.image)))
    with contextlib.ExitStack() as used:
        write = _writer(options, used)  # first: what is wrong with the name should not cost minutes
        heat = _heat_map(picture, options)
        if write is not None:
            drawn = heat.image()
            write(drawn)
    if write is not None:
        size = f"{drawn.width} x {drawn.height} pixels"
        Console(options.log_disable).note(f"{printable(options.output)}: {size}")
    print(json.dumps(_record(heat)) if options.json else heat.answer)


def _writer(
    options: argparse.Namespace, used: contextlib.ExitStack
) -> Callable[[Image.Image], object] | None:
    """What writes the drawing into a file that is open until `used` ends."""
    if options.output is None:
        return None
    from .._drawing import encoded, format_of
    from .._sources import input_files

    kind = format_of(options.output)
    inputs = input_files(options.image)
    file = used.enter_context(replacing(Path(options.output), n_bytes=0, inputs=inputs, durable=False))
    return lambda drawn: file.write(encoded(drawn, kind))


def _heat_map(picture: Image.Image, options: argparse.Namespace) -> HeatMap:
    from ..llava import Llava

    console = Console(options.log_disable)
    settle(options, console)
    with library_log(options), Llava(**model_arguments(options), progress=console.bars) as model:
        if model.is_demo:
            console.note(DEMO_NOTE)
        return model.explain(
            picture,
            options.question,
            options.answer,
            covered=options.covered,
            windows=options.windows,
            announce=lambda cost: console.note(f"heat map: {cost}"),
            system=options.system,
        )


def _parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} explain",
        usage=f"{PROGRAM} explain IMAGE QUESTION -o FILE [-m MODEL [--mmproj FILE]] [options]",
        description=_DESCRIPTION,
        add_help=False,
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture; - is standard input")
    parser.add_argument("question", metavar="QUESTION", help="what is asked about it")
    add = adder(parser, "heat map")
    add("-o --output", "FILE", "the drawing: .png, or another suffix of a picture")
    add("-a --answer", "TEXT", "the answer to explain (default: what the model answers, 64 tokens at most)")
    add(
        "--covered",
        "WHAT",
        "LLaVA-1.6: all rows of a place (default), those of the overview alone, or of the tiles alone",
        choices=("all", "overview", "tiles"),
        default="all",
    )
    add("--windows", "N", "windows at most (default: 64)", type=COUNT, default=64)
    add("--json", None, "the numbers as JSON on stdout instead of the answer")
    add_model(parser)
    add_devices(parser)
    add_prompt(parser, question=False, image=False)
    add_output(parser, question=False, timings=False)
    return parser


def _record(heat: HeatMap) -> dict[str, Any]:
    return {
        "question": heat.question,
        "answer": heat.answer,
        "logprob": heat.logprob,
        "method": heat.method,
        "peak": heat.peak,
        "peak_box": heat.peak_box,
        "array": heat.array.tolist(),
    }
