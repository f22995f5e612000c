"""Takes the projector and the vision tower out of a LLaVA-1.5 or 1.6 checkpoint, and writes the tower's
config.

    python convert/llava_surgery_v2.py -C -m DIR

writes DIR/llava.projector and DIR/llava.clip. The steps after it want the tower in a folder of its own:

    mkdir vit && cp DIR/llava.clip vit/pytorch_model.bin && cp DIR/llava.projector vit/
    python convert/llava_surgery_v2.py --write-vit-config DIR

The second command writes vit/config.json. The checkpoint itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._terminal import Parser
from .script import log, run

PROG = "llava_surgery_v2"
VIT_HINT = "copy both files to vit/, this one as vit/pytorch_model.bin, and run --write-vit-config"
NO_TOWER = "the checkpoint holds no vision tower (LLaVA-1.5): convert the folder of the one its config names"


def parser() -> Parser:
    args = Parser(
        PROG,
        description="Split projector and vision tower off a LLaVA checkpoint, or write the tower's config.",
    )
    what = args.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", type=Path, metavar="DIR", help="folder of the LLaVA checkpoint")
    what.add_argument(
        "--write-vit-config", type=Path, metavar="DIR",
        help="write vit/config.json (in this folder, or -o) from the config.json of the LLaVA model in DIR, "
        "its sizes checked against DIR/llava.clip",
    )  # fmt: skip
    args.add_argument(
        "-C", "--clean-vision-tower", action="store_true",
        help="write llava.clip too, the vision tower that the checkpoint holds",
    )  # fmt: skip
    args.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR",
        help="where to write (default: the model folder; vit for --write-vit-config)",
    )  # fmt: skip
    return args


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser()
    args = flags.parse_args(argv)
    if args.clean_vision_tower and args.model is None:
        flags.error("-C: needs -m DIR")

    def body() -> None:
        from .surgery import split_off
        from .vit_config import write_vit_config

        if args.write_vit_config is not None:
            print(write_vit_config(args.write_vit_config, args.output_dir or Path("vit")))
            return
        wanted = args.clean_vision_tower
        paths = split_off(args.model, args.output_dir or args.model, tower=wanted, hint=VIT_HINT)
        if wanted and len(paths) == 1:
            log.info(NO_TOWER)
        for path in paths:
            print(path)

    return run(PROG, body)


if __name__ == "__main__":
    raise SystemExit(main())
