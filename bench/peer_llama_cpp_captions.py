"""Descriptions of pictures by llama.cpp, through its own multimodal library: pictures per second, as JSON.

Pictures are encoded and read one after the other; `--parallel` answers are then written together, a token of each in one
step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from peer_llama_cpp import BATCH, Peer, quiet

QUESTION = "A chat between a curious user and an assistant. USER: {mark}\nDescribe the image. ASSISTANT:"
ROOM = 1024  # positions of a sequence: the picture's 576, the question, the answer


class Describer:
    def __init__(self, peer: Peer, mmproj: str, n_threads: int) -> None:
        self.peer = peer
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings = False, n_threads, False
        self.context = mtmd_cpp.mtmd_init_from_file(mmproj.encode(), peer.model, params)
        if not self.context:
            raise SystemExit(f"{mmproj}: mtmd_init_from_file failed")
        vocab = llama_cpp.llama_model_get_vocab(peer.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def read(self, path: str, sequence: int) -> int:
        """Reads a picture and the question into a sequence; returns the positions that it takes."""
        bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_file(self.context, path.encode(), False)
        text = mtmd_cpp.mtmd_input_text()
        mark = mtmd_cpp.mtmd_default_marker().decode()
        text.text, text.add_special, text.parse_special = QUESTION.format(mark=mark).encode(), True, True
        text.text_len = len(text.text)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit("mtmd_tokenize failed")
        n = ctypes.c_int32()
        llama_cpp.llama_memory_seq_rm(self.peer.memory, sequence, -1, -1)
        if mtmd_cpp.mtmd_helper_eval_chunks(
            self.context, self.peer.context, chunks, 0, sequence, BATCH, True, ctypes.byref(n)
        ):
            raise SystemExit("mtmd_helper_eval_chunks failed")
        return n.value

    def best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.peer.context, row)
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def describe(self, paths: list[str], n_tokens: int) -> None:
        """One answer of `n_tokens` for each picture, all in the same steps."""
        lengths, tokens = [], []
        for sequence, path in enumerate(paths):
            lengths.append(self.read(path, sequence))
            tokens.append(self.best(-1))
        for step in range(n_tokens - 1):
            positions = [length + step for length in lengths]
            self.peer.decode(tokens, positions, list(range(len(paths))), False)
            tokens = [self.best(row) for row in range(len(paths))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True)
    parser.add_argument("--mmproj", required=True)
    parser.add_argument("-n", type=int, required=True)
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("pictures", nargs="+")
    options = parser.parse_args()
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(quiet, None)
    mtmd_quiet: Any = quiet
    mtmd_cpp.mtmd_helper_log_set(mtmd_quiet, None)
    describer = Describer(Peer(options.m, options.t, ROOM, options.parallel), options.mmproj, options.t)
    started = time.perf_counter()
    for first in range(0, len(options.pictures), options.parallel):
        describer.describe(options.pictures[first : first + options.parallel], options.n)
    seconds = time.perf_counter() - started
    print(json.dumps({"pictures_per_second": len(options.pictures) / seconds}))


if __name__ == "__main__":
    main()
