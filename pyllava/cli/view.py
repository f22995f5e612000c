"""``pyllava-cli view IMAGE -o view.png``: what a model sees of a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from .._named_pictures import found
from .._terminal import Console, printable, say
from .hub import settle
from .option_kinds import adder
from .options import PROGRAM, Parser, add_files, add_tiles, check_pairs

_DESCRIPTION = """\
Draw what a model sees of a picture: its views and their patches, what is border, and which patches become rows for the
language model. The same numbers go to stdout.
"""


def view(argv: Sequence[str]) -> None:
    """Draw as the command line says; every failure is an exception."""
    parser = Parser(prog=f"{PROGRAM} view", description=_DESCRIPTION)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a picture; - is standard input")
    add("-o", "--output", metavar="FILE", help="the drawing: .png, or another suffix of a picture")
    add("--json", action="store_true", help="the numbers as JSON on stdout")
    add_tiles(adder(parser, "pictures"))
    add_files(adder(parser, "model"))
    options = parser.parse(argv)
    check_pairs(options, parser)
    if options.output is None and not options.json:
        parser.error("need -o FILE for the drawing, or --json for the numbers alone")
    settle(options, Console(quiet=False))
    from .. import _drawing
    from .._sources import input_files
    from ..images import load_image, open_source
    from ..llava import Llava

    picture = load_image(open_source(found(options.image)))
    with Llava(
        options.model,
        options.mmproj,
        n_ctx=1,
        n_parallel=1,
        device="cpu",
        template="plain",
        image_max_tiles=options.image_max_tiles,
        image_merge=options.image_merge,
    ) as model:
        seen = model.view(picture)
    if options.output is not None:
        drawing = seen.image()
        _drawing.save(drawing, options.output, input_files(options.image))
        say(f"{printable(os.fspath(options.output))}: {drawing.width} x {drawing.height} pixels")
    print(json.dumps(seen.facts()) if options.json else "\n".join(seen.words()))
