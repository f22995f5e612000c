"""Takes the projector, and a vision tower trained with it, out of a LLaVA checkpoint.

    python convert/llava_surgery.py -m DIR

writes DIR/llava.projector (and DIR/llava.clip where the checkpoint holds its own tower) in the safetensors
format. The checkpoint itself is left as it is: the language model is converted with `--skip-unknown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._terminal import Parser
from .script import run

PROG = "llava_surgery"


def parser() -> Parser:
    args = Parser(
        PROG, description="Split the projector (and a vision tower, if any) off a LLaVA checkpoint."
    )
    args.add_argument(
        "-m", "--model", type=Path, required=True, metavar="DIR", help="folder of the LLaVA checkpoint"
    )
    args.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR", help="where to write (default: the model folder)"
    )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def body() -> None:
        from .surgery import split_off

        for path in split_off(args.model, args.output_dir or args.model):
            print(path)

    return run(PROG, body)


if __name__ == "__main__":
    raise SystemExit(main())
