"""CLIP-L/14-336 (23 of 24 layers) in PyTorch: seconds for one view and for five; see compare.py.

In bfloat16 where the CPU multiplies it, else in float32.
"""

from __future__ import annotations

import argparse
import json

import torch
import views
from transformers import CLIPVisionConfig, CLIPVisionModel


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-t", type=int, default=2)
    torch.set_num_threads(parser.parse_args().t)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336,
        patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = CLIPVisionModel(config).to(dtype).eval()
    result = views.measure(lambda pixels: model(torch.from_numpy(pixels).to(dtype)))
    print(json.dumps({"precision": "bf16" if bf16 else "f32"} | result))


if __name__ == "__main__":
    main()
