"""One measurement of llama.cpp by llama-cpp-python, in the form of `pyllava-cli bench --json`."""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from typing import Any

import llama_cpp
import numpy as np

REPEAT = 2
BATCH = 512  # tokens per step


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, user: Any) -> None:
    pass


class Peer:
    def __init__(
        self, path: str, n_threads: int, n_ctx: int, n_seq: int, model: Any = None, n_gpu_layers: int = 0
    ) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.model = model or llama_cpp.llama_model_load_from_file(path.encode(), params)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx * n_seq, BATCH, BATCH
        context.n_threads = context.n_threads_batch = n_threads
        context.n_seq_max = n_seq
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def decode(self, tokens: list[int], positions: list[int], sequences: list[int], last_only: bool) -> float:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not last_only or i == len(tokens) - 1
        started = time.perf_counter()
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - started
        llama_cpp.llama_batch_free(batch)
        return seconds

    def prefill(self, tokens: list[int], sequence: int = 0) -> float:
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        return self.read(tokens, sequence)

    def read(self, tokens: list[int], sequence: int = 0) -> float:
        """From position 0, step by step."""
        seconds = 0.0
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            positions = list(range(start, start + len(part)))
            seconds += self.decode(part, positions, [sequence] * len(part), True)
        return seconds


def decode_batch(peer: Peer, n_seq: int, n_predict: int, tokens: list[int], n_prompt: int = 32) -> float:
    for sequence in range(n_seq):
        peer.prefill(tokens[:n_prompt], sequence)
    times = [
        peer.decode(tokens[i : i + n_seq], [n_prompt + i] * n_seq, list(range(n_seq)), False)
        for i in range(n_predict)
    ]
    return n_seq / statistics.median(times)


def encode_seconds(
    model: Any, path: str, n_threads: int, repeat: int = REPEAT, use_gpu: bool = False
) -> float:
    """One 336-pixel image through llama.cpp's own multimodal library: the median after one run that is not
    counted, or, without repeats, the one run.
    """
    from llama_cpp import mtmd_cpp

    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.print_timings = use_gpu, n_threads, False
    context = mtmd_cpp.mtmd_init_from_file(path.encode(), model, params)
    if not context:
        raise SystemExit(f"{path}: mtmd_init_from_file failed")
    pixels = np.random.RandomState(0).randint(0, 256, (336, 336, 3)).astype(np.uint8)
    data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(336, 336, data)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    text = mtmd_cpp.mtmd_input_text()
    text.text, text.add_special, text.parse_special = mtmd_cpp.mtmd_default_marker(), False, True
    text.text_len = len(text.text)
    bitmaps = (ctypes.c_void_p * 1)(bitmap)
    if mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1):
        raise SystemExit("mtmd_tokenize failed")
    found = [
        mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))
    ]
    image = next(
        c for c in found if mtmd_cpp.mtmd_input_chunk_get_type(c) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
    )
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        if mtmd_cpp.mtmd_encode_chunk(context, image):
            raise SystemExit("mtmd_encode_chunk failed")
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)


def first_token(options: argparse.Namespace, tokens: list[int]) -> None:
    """Load, encode a picture, read a prompt of its 576 rows and 48 tokens, get the logits of one token."""
    peer = Peer(options.m, options.t, 2048, 1, n_gpu_layers=options.ngl)
    encode_seconds(peer.model, options.mmproj, options.t, repeat=0, use_gpu=options.ngl > 0)
    peer.read((tokens * 2)[: 576 + 48])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--batch", default="1")
    parser.add_argument("--batch-prompt", type=int, default=32, help="tokens before each sequence of a batch")
    parser.add_argument("-ngl", type=int, default=0)
    parser.add_argument(
        "--first-token", action="store_true", help="only up to the first token, with a picture"
    )
    parser.add_argument(
        "--backends", help="a folder with ggml's back ends, where they are files of their own"
    )
    options = parser.parse_args()
    if options.backends:
        llama_cpp.llama_cpp._lib.ggml_backend_load_all_from_path(options.backends.encode())
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(quiet, None)
    n_tokens = max(options.p, options.batch_prompt) + options.n + 64
    tokens = [int(i) for i in np.random.RandomState(0).randint(300, 30000, n_tokens)]
    if options.first_token:
        first_token(options, tokens)
        return
    started = time.perf_counter()
    peer = Peer(options.m, options.t, options.p + options.n + 64, 1, n_gpu_layers=options.ngl)
    result: dict[str, Any] = {"load_s": time.perf_counter() - started}
    if options.mmproj:
        result["encode_s"] = encode_seconds(peer.model, options.mmproj, options.t, use_gpu=options.ngl > 0)
    peer.prefill(tokens[: options.p])
    result["prefill_tok_s"] = options.p / statistics.median(
        peer.prefill(tokens[: options.p]) for _ in range(REPEAT)
    )
    times = [peer.decode([tokens[i]], [options.p + i], [0], False) for i in range(options.n)]
    result["decode_tok_s"] = 1 / statistics.median(times)
    llama_cpp.llama_free(peer.context)
    result["decode_batch_tok_s"] = {}
    for n_seq in map(int, options.batch.split(",")):
        n = options.batch_prompt
        many = Peer(options.m, options.t, n + options.n + 32, n_seq, peer.model)
        result["decode_batch_tok_s"][str(n_seq)] = decode_batch(many, n_seq, options.n, tokens, n)
        llama_cpp.llama_free(many.context)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
