"""CLIP-L/14-336 (23 of 24 layers) in PyTorch and bfloat16: seconds for one view and for five; see compare.py."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

REPEAT = 3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-t", type=int, default=2)
    torch.set_num_threads(parser.parse_args().t)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336,
        patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config).to(torch.bfloat16).eval()
    result = {}
    for name, n_views in (("encode_s", 1), ("encode_5_s", 5)):
        pixels = torch.randn(n_views, 3, 336, 336, dtype=torch.bfloat16)
        times = []
        for _ in range(REPEAT + 1):
            started = time.perf_counter()
            model(pixels)
            times.append(time.perf_counter() - started)
        result[name] = statistics.median(times[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
