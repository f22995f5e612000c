"""CLIP-L/14-336 (23 of 24 layers) in OpenVINO: seconds for one view and for five; see compare.py.

In bfloat16 where the CPU multiplies it, else in float32.
"""

from __future__ import annotations

import argparse
import json

import openvino
import torch
import views
from transformers import CLIPVisionConfig, CLIPVisionModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-t", type=int, default=2)
    n_threads = parser.parse_args().t
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336,
        patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=torch.zeros(1, 3, 336, 336))
    core = openvino.Core()
    precision = "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    compiled = core.compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": n_threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    print(json.dumps({"precision": precision} | views.measure(lambda pixels: compiled([pixels]))))


if __name__ == "__main__":
    main()
