"""CLIP-L/14-336 (23 of 24 layers) in OpenVINO: seconds for one view and for five; see compare.py.

Every way that OpenVINO has on a CPU, the fastest of them first of all: float32, bfloat16 where the CPU
multiplies it, int8 weights with activations quantised on the fly in groups of 128 (`nncf.compress_weights`),
all in int8 (`nncf.quantize`, ranges from a few random views). With each the cosine of its rows to those of
float32: the mean, and the worst.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import nncf
import numpy as np
import openvino
import torch
import views
from transformers import CLIPVisionConfig, CLIPVisionModel

CALIBRATION = 8  # views


def network() -> openvino.Model:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336,
        patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    with torch.no_grad():
        return openvino.convert_model(model, example_input=torch.zeros(1, 3, 336, 336))


def random_views(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.RandomState(1).standard_normal((n, 3, 336, 336)).astype(np.float32)


def ways(bf16: bool) -> Iterator[tuple[str, openvino.Model, dict[str, object]]]:
    """Name, network, settings."""
    yield "f32", network(), {"INFERENCE_PRECISION_HINT": "f32"}
    if bf16:
        yield "bf16", network(), {"INFERENCE_PRECISION_HINT": "bf16"}
    weights = nncf.compress_weights(network(), mode=nncf.CompressWeightsMode.INT8_SYM)
    yield "int8 weights", weights, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    data = nncf.Dataset([view[None] for view in random_views(CALIBRATION)])
    whole = nncf.quantize(network(), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
    yield "int8", whole, {}


def cosines(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> tuple[float, float]:
    a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (expected, found))
    rows = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return float(rows.mean()), float(rows.min())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-t", type=int, default=2)
    n_threads = parser.parse_args().t
    core = openvino.Core()
    found: dict[str, dict[str, float]] = {}
    expected = None
    view = random_views(CALIBRATION + 1)[-1:]  # that no range was taken from
    for name, model, settings in ways("BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        usual = {"INFERENCE_NUM_THREADS": n_threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(model, "CPU", usual | settings)
        rows = compiled([view])[0]
        expected = rows if expected is None else expected
        mean, worst = cosines(expected, rows)
        times = views.measure(lambda pixels, run=compiled: run([pixels]))
        found[name] = times | {"cosine_mean": mean, "cosine_worst": worst}
    fastest = min(found, key=lambda name: found[name]["encode_s"])
    print(json.dumps({"precision": fastest} | found[fastest] | {"ways": found}))


if __name__ == "__main__":
    main()
