"""Milliseconds that choosing a token takes, on one thread: the 10th percentile of 1,000 calls.

python bench/sampler.py [--calls 1000] [--vocabularies 32000 152064]

Each call gets other logits of its kind: "flat" (deviates of 0.01), "Gaussian" (of 3) and "peaked" (of 3, with
one token 12 above the largest). The models are files of a vocabulary and one tiny layer, made in a temporary
folder.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from pyllava import _lib

N_ROWS = 16  # of logits, taken in turn
WIDTH = 32
BREAKERS = ["\n", ":", '"', "*"]
ALL: dict[str, Any] = {
    "temperature": 1.0,
    "dynatemp_range": 0.5,
    "top_k": -2,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 0.9,
    "top_n_sigma": 3.0,
    "xtc_probability": 0.5,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "dry_multiplier": 0.8,
    "dry_penalty_last_n": 4096,
    "dry_sequence_breakers": BREAKERS,
    "adaptive_target": 0.3,
    "logit_bias": [(5, 1.0)],
    "ignore_eos": True,
}  # a top_k of -2 is half of the vocabulary
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top_k 40": {"temperature": 1.0, "top_k": 40},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top_k 40, top_p 0.9, penalty": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.1},
    "top_p 0.9, penalty": {"temperature": 1.0, "top_p": 0.9, "repeat_penalty": 1.1},
    "temperature 1.5, top_p 0.999": {"temperature": 1.5, "top_p": 0.999},
    "temperature 1.5, top_p 0.999, penalty": {"temperature": 1.5, "top_p": 0.999, "repeat_penalty": 1.1},
    "temperature 1.5, top_p 0.5, min_p 0.05, penalty": {
        "temperature": 1.5,
        "top_p": 0.5,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
    },
    "temperature 1.5, top_k half, top_p 0.999": {"temperature": 1.5, "top_k": -2, "top_p": 0.999},
    "penalties": {
        "temperature": 1.0,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
    },
    "DRY": {
        "temperature": 1.0,
        "dry_multiplier": 0.8,
        "dry_penalty_last_n": 4096,
        "dry_sequence_breakers": BREAKERS,
    },
    "logit_bias, ignore_eos": {"temperature": 1.0, "logit_bias": [(5, 1.0)], "ignore_eos": True},
    "top_n_sigma 1": {"temperature": 1.0, "top_n_sigma": 1.0},
    "typical 0.9": {"temperature": 1.0, "typical_p": 0.9},
    "XTC": {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.1},
    "dynamic temperature": {"temperature": 1.0, "dynatemp_range": 0.5},
    "adaptive_p": {"temperature": 1.0, "adaptive_target": 0.3},
    "mirostat 1": {"temperature": 1.0, "mirostat": 1},
    "mirostat 2": {"temperature": 1.0, "mirostat": 2},
    "all": ALL,
    "all, top_k 40": {**ALL, "top_k": 40},
}


def write_model(path: Path, n_vocab: int) -> Path:
    """A tiny language model with a vocabulary of this size, 259 at least."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(first + [f"t{i}" for i in range(len(first), n_vocab)])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (n_vocab - len(first)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    matrix, norm = np.zeros((WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, WIDTH), np.float16))
    writer.add_tensor("output.weight", np.zeros((n_vocab, WIDTH), np.float16))
    writer.add_tensor("output_norm.weight", norm)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(kind: str, n_vocab: int) -> npt.NDArray[np.float32]:
    """float32 [N_ROWS, n_vocab]"""
    random = np.random.RandomState(1)
    rows = random.standard_normal((N_ROWS, n_vocab)).astype(np.float32)
    rows *= np.float32(0.01 if kind == "flat" else 3)
    if kind == "peaked":
        rows[np.arange(N_ROWS), random.randint(0, n_vocab, N_ROWS)] = rows.max(axis=1) + 12
    return rows


def measure(sampler: _lib.SamplerHandle, rows: npt.NDArray[np.float32], calls: int) -> float:
    """Milliseconds."""
    times = []
    for i in range(calls + 20):
        started = time.perf_counter()
        sampler.sample(rows[i % len(rows)])
        times.append(time.perf_counter() - started)
    return float(np.percentile(times[20:], 10)) * 1e3


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 152064])
    options = parser.parse_args()
    kinds = ("flat", "Gaussian", "peaked")
    print(f"{processor()}: ms per token, 10th percentile of {options.calls} calls\n")
    with tempfile.TemporaryDirectory() as folder:
        for n_vocab in options.vocabularies:
            model = _lib.ModelHandle(write_model(Path(folder) / f"{n_vocab}.gguf", n_vocab), None)
            rows = {kind: logits_of(kind, n_vocab) for kind in kinds}
            print(f"| {n_vocab} tokens | {' | '.join(kinds)} |\n|---|---|---|---|")
            for name, setting in SETTINGS.items():
                given = {key: n_vocab // 2 if value == -2 else value for key, value in setting.items()}
                found = [
                    measure(_lib.SamplerHandle(model, seed=1, **given), rows[k], options.calls) for k in kinds
                ]
                print(f"| {name} | {' | '.join(f'{ms:.3f}' for ms in found)} |", flush=True)
            print()
            model.close()


if __name__ == "__main__":
    main()
