"""The options of ``pyllava-cli caption``."""

from __future__ import annotations

import argparse

from .option_kinds import COUNT, COUNT_OR_0, POSITIVE, adder
from .options import (
    PROGRAM,
    Parser,
    add_answer,
    add_devices,
    add_model,
    add_output,
    add_prompt,
)

WRITTEN = ("txt", "jsonl", "csv", "parquet")
PARALLEL = 8
_INPUTS = """\
A picture; a folder, with those below it; a quoted pattern; @FILE, a list of paths (@- reads it from standard input); a .jsonl, .csv,
.tsv or .parquet file with a column of paths; a WebDataset .tar; - for one picture on standard input."""
_EXAMPLES = """\
examples:
  pyllava-cli caption photos/ -p "Describe the image." -o captions.jsonl        the same command goes on where it was stopped
  pyllava-cli caption -m DIR dataset/ -p "Describe it." --write txt             dataset/a.txt beside dataset/a.jpg
  pyllava-cli caption merge captions.jsonl captions-*.jsonl                     one output of several, of shards or of folders
  pyllava-cli caption -m DIR shard-0001.tar -o captions.parquet                 captions.jsonl grows, Parquet is made at the end
  pyllava-cli caption -m DIR photos/ -o captions.jsonl --engine ray --address auto     on all nodes of a Ray cluster

Exit codes: 0 all pictures have captions, 1 some have not (their rows say why), 2 wrong usage, 130 stopped with Ctrl-C.
"""


def caption_parser() -> Parser:
    options = Parser(
        prog=f"{PROGRAM} caption",
        usage=f"{PROGRAM} caption INPUT... -o FILE [-m MODEL [--mmproj FILE]] [-p PROMPT] [options]\n"
        f"       {PROGRAM} caption merge OUTPUT ROWS...",
        description="Captions for many pictures. A run that was stopped, or killed, goes on with the same command.",
        epilog=_EXAMPLES,
        add_help=False,
    )
    options.add_argument("inputs", metavar="INPUT", nargs="+", help=_INPUTS)
    _add_written(options)
    add_model(options, parallel=PARALLEL)
    add_devices(options)
    _add_engine(options)
    add_prompt(options, image=False)
    _add_texts(options)
    add_answer(options)
    add_output(options, question=False, timings=False)
    return options


def merge_parser() -> Parser:
    options = Parser(
        prog=f"{PROGRAM} caption merge",
        description="One output of several: each picture once, with the row that succeeded, else the last one.",
        add_help=False,
    )
    options.add_argument("output", metavar="OUTPUT", help=".jsonl, .csv or .parquet")
    options.add_argument("rows", metavar="ROWS", nargs="+", help=".jsonl files of earlier runs")
    add_output(options, question=False, timings=False)
    return options


def _add_written(options: Parser) -> None:
    add = adder(options, "captions")
    add(
        "-o --output",
        "FILE",
        "captions.jsonl, a row for each picture, which later runs go on from; .csv or .parquet: that, too, at the end of "
        "a run; -: JSON Lines on stdout",
    )
    add(
        "--write",
        "KINDS",
        f"more of {', '.join(WRITTEN)}, with commas; txt: a text beside each picture",
        default="",
    )
    add(
        "--caption-extension",
        "EXT",
        "of the texts (default: .txt); {ext} in it is that of the picture",
        default=".txt",
    )
    add(
        "--existing",
        "WHAT",
        "with texts that are there already: skip their pictures (default), overwrite, append, prepend",
        choices=("skip", "overwrite", "append", "prepend"),
    )
    add("--overwrite", None, "begin anew: rows and texts of earlier runs are replaced")
    add("--column", "NAME", "column of paths in a table (default: path, file_name, image, ...)")
    add(
        "--shard",
        "I/N",
        "only this part of the pictures, 1/N to N/N, by a hash of the path, into captions-0000I-of-0000N.jsonl; slurm: the "
        "task of a job array; `caption merge` joins them",
    )
    add("--max-errors", "N", "stop when more than N pictures have failed (default: never)", type=COUNT_OR_0)
    add("--json", None, "at the end the counts as one JSON object on stdout (the rows are JSON anyway)")


def _add_engine(options: Parser) -> None:
    add = adder(options, "a cluster")
    add(
        "--engine",
        "NAME",
        "ray: workers on a Ray cluster, which see pictures and model under the same names; rows come back here (default: "
        "this process computes)",
        choices=("ray",),
    )
    add(
        "--address",
        "ADDRESS",
        "auto: the cluster of this machine; ray://HOST:PORT; local: one for this run (default: $RAY_ADDRESS, else local)",
    )
    add("--workers", "N", "workers, with a model each (default: as many as there is room for)", type=COUNT)
    add("--worker-cpus", "N", "CPUs and threads of each (default: those of the smallest node)", type=COUNT)


def check_engine(options: argparse.Namespace, parser: Parser) -> None:
    """Ends with a usage error where options do not go with the engine."""
    given = {
        "--address": options.address,
        "--workers": options.workers,
        "--worker-cpus": options.worker_cpus,
    }
    for name, value in given.items():
        if value is not None and options.engine is None:
            parser.error(f"{name}: needs --engine ray")
    if options.engine is not None and "-" in options.inputs:
        parser.error("-: no worker sees standard input: name files with --engine ray")


def _add_texts(options: Parser) -> None:
    add = adder(options, "captions from answers ({name}, {dir} and {stem} in the prompt are the picture's)")
    add("--start-with", "TEXT", "the beginning of every answer, from which the model goes on", default="")
    add("--prefix", "TEXT", "put before every caption", default="")
    add("--suffix", "TEXT", "put behind every caption", default="")
    add(
        "--strip",
        "TEXT",
        "taken off the beginning of answers, in capitals or not; repeatable",
        action="append",
        default=[],
    )
    add(
        "--fail-phrases",
        "TEXT",
        "an answer with this in it is an error; repeatable",
        action="append",
        default=[],
    )
    add("--samples", "N", "captions for each picture (default: 1; more need --temp)", type=COUNT, default=1)
    add("--timeout", "SECONDS", "for an answer; what there is then is the caption", type=POSITIVE)
    add("--no-loop-detector", None, "let answers repeat themselves until they are full")
