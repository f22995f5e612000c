"""Converts the language model of a LLaVA checkpoint, or any LLaMA-family checkpoint, to GGUF.

    python convert/convert_legacy_llama.py DIR --skip-unknown

writes DIR/ggml-model-f16.gguf. No torch is needed, and memory stays small whatever the checkpoint's size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._terminal import Parser
from .mixes import OUT_TYPES
from .script import run

PROG = "convert_legacy_llama"
VOCAB_TYPES = ("spm", "hfft")
VOCAB_HELP = "vocabularies to look for, in this order (default: spm,hfft)"


def vocab_types(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in VOCAB_TYPES:
            known = ", ".join(VOCAB_TYPES)
            raise argparse.ArgumentTypeError(
                f"{kind!r} is not supported (known: {known}, or both with a comma)"
            )
    return kinds


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parser() -> Parser:
    args = Parser(PROG, description="Convert a LLaMA-family checkpoint (safetensors or torch) to GGUF.")
    add = args.add_argument
    add("model", type=Path, help="folder of the checkpoint, or one of its files")
    add(
        "--outtype", choices=OUT_TYPES, default="f16", help="type of matrices (default: f16); vectors are f32"
    )
    add("--outfile", type=Path, metavar="FILE", help="(default: ggml-model-<outtype>.gguf in the folder)")
    add("--skip-unknown", action="store_true", help="leave out what is not the language model's")
    add("--pad-vocab", action="store_true", help="fill a vocabulary that is too short with dummy tokens")
    add("--vocab-type", type=vocab_types, default=VOCAB_TYPES, metavar="TYPES", help=VOCAB_HELP)
    add("--vocab-dir", type=Path, metavar="DIR", help="folder of the tokenizer (default: the model's)")
    add("--vocab-only", action="store_true", help="write the vocabulary without any tensor")
    add("--ctx", type=positive, metavar="N", help="context length, instead of the config's")
    add("--model-name", metavar="NAME", help="general.name (default: the folder's name)")
    add("--dump", action="store_true", help="list the tensors on stdout and convert nothing")
    add("--get-outfile", action="store_true", help="print the name of the output and convert nothing")
    add("--verbose", action="store_true", help="one line per tensor")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def body() -> None:
        from .language_model import Options, convert, default_outfile, dump

        options = Options(
            outfile=args.outfile,
            outtype=args.outtype,
            vocab_only=args.vocab_only,
            vocab_dir=args.vocab_dir,
            vocab_types=args.vocab_type,
            pad_vocab=args.pad_vocab,
            skip_unknown=args.skip_unknown,
            n_ctx=args.ctx,
            model_name=args.model_name,
        )
        if args.get_outfile:
            print(default_outfile(args.model, options))
        elif args.dump:
            print("\n".join(dump(args.model)))
        else:
            print(convert(args.model, options))

    return run(PROG, body, verbose=args.verbose)


if __name__ == "__main__":
    raise SystemExit(main())
