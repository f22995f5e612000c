"""Joins a CLIP vision tower and a LLaVA projector into one projector file.

    python convert/convert_image_encoder_to_gguf.py -m CLIP_DIR --llava-projector DIR/llava.projector
    --output-dir OUT

writes OUT/mmproj-model-f16.gguf. LLaVA's settings (which layer feeds the projector, how images are shaped)
are taken from the config.json beside the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._terminal import Parser
from .mixes import OUT_TYPES
from .script import run

PROG = "convert_image_encoder_to_gguf"


def parser() -> Parser:
    args = Parser(
        PROG, description="Convert a CLIP vision tower and a LLaVA projector to a projector file (GGUF)."
    )
    args.add_argument(
        "-m", "--model-dir", type=Path, required=True, metavar="DIR", help="folder of the CLIP model"
    )
    args.add_argument(
        "--llava-projector", type=Path, metavar="FILE", help="llava.projector, from llava_surgery"
    )
    args.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR", help="where to write (default: the CLIP folder)"
    )
    types = args.add_mutually_exclusive_group()
    types.add_argument(
        "--outtype",
        choices=OUT_TYPES,
        default="f16",
        help="of the matrices (default: f16)",
    )
    types.add_argument(
        "--use-f32", dest="outtype", action="store_const", const="f32",
        help="the same as --outtype f32; the patch convolution is f16 all the same",
    )  # fmt: skip
    args.add_argument("--vision-only", action="store_true", help="write the vision tower only (always so)")
    args.add_argument(
        "--text-only", action="store_true", help="refused: LLaVA has no use for CLIP's text tower"
    )
    which = args.add_mutually_exclusive_group()
    which.add_argument(
        "--clip-model-is-vision", dest="layout", action="store_const", const="vision",
        help="config.json describes the vision tower itself (found out if left out)",
    )  # fmt: skip
    which.add_argument(
        "--clip-model-is-openclip", dest="layout", action="store_const", const="clip",
        help="config.json describes a whole CLIP model (found out if left out)",
    )  # fmt: skip
    args.add_argument(
        "--projector-type", choices=("mlp", "ldp", "ldpv2"), help="refuse any other (default: found out)"
    )
    args.add_argument(
        "--image-mean", type=float, nargs=3, metavar="F", help="(default: preprocessor_config.json, CLIP's)"
    )
    args.add_argument(
        "--image-std", type=float, nargs=3, metavar="F", help="(default: preprocessor_config.json, CLIP's)"
    )
    args.add_argument("--verbose", action="store_true", help="one line per tensor")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser()
    args = flags.parse_args(argv)
    if args.text_only:
        flags.error("--text-only: a projector file holds the vision tower, nothing can be written")
    if args.llava_projector is None:
        flags.error("--llava-projector is needed: run llava_surgery on the LLaVA checkpoint first")

    def body() -> None:
        from .projector_file import convert

        path = convert(
            args.model_dir,
            args.llava_projector,
            args.output_dir or args.model_dir,
            outtype=args.outtype,
            wanted_type=args.projector_type,
            layout=args.layout,
            mean=args.image_mean,
            std=args.image_std,
        )
        print(path)

    return run(PROG, body, verbose=args.verbose)


if __name__ == "__main__":
    raise SystemExit(main())
