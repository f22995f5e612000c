"""Converts a published LLaVA-1.5 or 1.6 checkpoint in one step.

    python convert/convert_llava.py DIR -o OUT --outtype q4_k_m

writes OUT/<name>-q4_k_m.gguf (the language model) and OUT/mmproj-<name>-f16.gguf (vision tower and
projector), which pyllava-cli finds together. DIR is of the original layout (liuhaotian/llava-*) or of Hugging
Face's (llava-hf/*).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from .._terminal import Parser, duration, path_of
from .chat_template import NAMES
from .mixes import MIX_NAMES, OUT_TYPES
from .script import log, run

PROG = "convert_llava"


def parser(prog: str = PROG) -> Parser:
    args = Parser(prog, description="Convert a LLaVA checkpoint to a language model and a projector (GGUF).")
    add = args.add_argument
    add(
        "model", type=path_of, metavar="DIR", help="folder of the checkpoint, original or Hugging Face layout"
    )
    add("-o", "--output-dir", type=path_of, metavar="OUT", help="folder to write into (default: DIR)")
    add(
        "--outtype", type=str.lower, choices=MIX_NAMES, default="f16", metavar="TYPE",
        help=f"of the language model's matrices (default: f16): {', '.join(MIX_NAMES)}",
    )  # fmt: skip
    add(
        "--mmproj-outtype", type=str.lower, choices=OUT_TYPES, default="f16", metavar="TYPE",
        help=f"of the projector file's matrices (default: f16): {', '.join(OUT_TYPES)}",
    )  # fmt: skip
    add(
        "--vision-tower", type=path_of, metavar="DIR",
        help="folder of the CLIP model (default: the one that config.json names, in DIR or beside it); of a "
        "checkpoint with its own tower only the settings are taken from there",
    )  # fmt: skip
    add(
        "--template", choices=sorted(NAMES), metavar="NAME",
        help=f"prompt template (default: told by the model's name): {', '.join(NAMES)}",
    )  # fmt: skip
    add("--name", help="of the model, in the files and their names (default: the folder's)")
    add("--pad-vocab", action="store_true", help="fill a vocabulary that is too short with dummy tokens")
    add("--no-check", action="store_true", help="do not open the finished files with pyllava")
    add("--force", action="store_true", help="replace files that are there already")
    add("--verbose", action="store_true", help="one line per tensor")
    return args


def main(argv: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    args = parser(prog).parse_args(argv)

    def body() -> None:
        from .llava_model import Options, convert

        started = time.monotonic()
        options = Options(
            outtype=args.outtype,
            mmproj_outtype=args.mmproj_outtype,
            vision_tower=args.vision_tower,
            template=args.template,
            name=args.name,
            pad_vocab=args.pad_vocab,
            check=not args.no_check,
            overwrite=args.force,
        )
        model = convert(args.model, args.output_dir or args.model, options)
        print(model.model)
        print(model.mmproj)
        log.info("converted in %s", duration(time.monotonic() - started))
        log.info("now ask: %s", command(model.model, model.mmproj))

    return run(prog, body, verbose=args.verbose)


def command(model: Path, mmproj: Path) -> str:
    """The line that asks the new model; it names the projector only where pyllava could take another one."""
    others = [path for path in model.parent.glob("*.gguf") if "mmproj" in path.name.lower()]
    beside = [] if others == [mmproj] else ["--mmproj", str(mmproj)]
    words = ["pyllava-cli", "-m", str(model), *beside, "--image", "IMAGE.jpg", "-p", "What is this?"]
    return shlex.join(words)


if __name__ == "__main__":
    raise SystemExit(main())
