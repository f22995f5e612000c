"""A language model of a real shape, random weights, as int4 OpenVINO IR for peer_openvino_lm.py.

python bench/make_openvino_lm.py --shape 1b [--sym] [--group-size 128] OUT_DIR

Needs optimum-intel and nncf. Exported as `optimum-cli export openvino --weight-format int4` does: the layers'
matrices in int4 with group scales (and, without --sym, zero points), embeddings and output in int8, the KV
cache inside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {  # n_embd, n_layer, n_head, n_head_kv, n_ff; as in make_model.py, which needs pyllava
    "tiny": (256, 2, 4, 4, 512),
    "1b": (2048, 22, 32, 4, 5632),  # TinyLlama's
    "7b": (4096, 32, 32, 32, 11008),
}


def checkpoint(shape: str) -> LlamaForCausalLM:
    """Normal deviates of 0.02, as models are initialised, in bfloat16."""
    d, n_layer, n_head, n_kv, f = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=d, num_hidden_layers=n_layer, num_attention_heads=n_head,
        num_key_value_heads=n_kv, intermediate_size=f, max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--sym", action="store_true", help="int4 without zero points")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    quantization = OVWeightQuantizationConfig(bits=4, sym=options.sym, group_size=options.group_size)
    with tempfile.TemporaryDirectory(dir=options.out.resolve().parent) as folder:
        checkpoint(options.shape).save_pretrained(folder)
        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, quantization_config=quantization
        )
        model.save_pretrained(options.out)
    size = (options.out / "openvino_model.bin").stat().st_size
    print(f"{options.out}: {size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
