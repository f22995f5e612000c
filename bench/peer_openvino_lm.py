"""One measurement of OpenVINO on a model of make_openvino_lm.py: prefill and decoding; see compare.py.

OpenVINO is asked for activations quantised in groups of 128; on AVX2 without VNNI it multiplies in float32
all the same, which `kernels` says. The KV cache has its default type. As in OpenVINO GenAI, logits are
computed of the last token only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops

REPEAT = 2


def last_logits_only(model: openvino.Model) -> None:
    """Lets only the last position into the product with the output matrix."""
    product = model.output("logits").node.input_value(0).node
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).node
    start, stop, one = (np.array([number]) for number in (-1, np.iinfo(np.int64).max, 1))
    last = ops.slice(product.input_value(0), start, stop, one, one)  # axis 1
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class Peer:
    def __init__(self, folder: Path, n_threads: int) -> None:
        core = openvino.Core()
        model = core.read_model(folder / "openvino_model.xml")
        last_logits_only(model)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": n_threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
        }
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.inputs = {name for port in self.compiled.inputs for name in port.names}
        self.n_past = 0

    def kernels(self) -> list[str]:
        """What multiplies with the weights; known after a run."""
        infos = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ops()]
        products = [info for info in infos if info["layerType"].astype(str) == "FullyConnected"]
        return sorted({info["primitiveType"].astype(str) for info in products})

    def decode(self, tokens: list[int]) -> float:
        n = len(tokens)
        given = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, self.n_past + n), np.int64),
            "position_ids": np.arange(self.n_past, self.n_past + n)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        given = {name: value for name, value in given.items() if name in self.inputs}
        started = time.perf_counter()
        self.request.infer(given)
        seconds = time.perf_counter() - started
        self.n_past += n
        assert self.request.get_output_tensor(0).shape[:2] == [1, 1]
        return seconds

    def prefill(self, tokens: list[int]) -> float:
        self.request.reset_state()
        self.n_past = 0
        return self.decode(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of make_openvino_lm.py")
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("-t", type=int, default=2)
    options = parser.parse_args()
    tokens = [int(i) for i in np.random.RandomState(0).randint(300, 30000, options.p + options.n)]
    started = time.perf_counter()
    peer = Peer(options.model, options.t)
    result: dict[str, object] = {"load_s": time.perf_counter() - started}
    for key, name in (("precision", "INFERENCE_PRECISION_HINT"), ("cache", "KV_CACHE_PRECISION")):
        result[key] = peer.compiled.get_property(name).to_string()
    peer.prefill(tokens[: options.p])
    result["kernels"] = peer.kernels()
    prefill = statistics.median(peer.prefill(tokens[: options.p]) for _ in range(REPEAT))
    result["prefill_tok_s"] = options.p / prefill
    times = [peer.decode([token]) for token in tokens[options.p :]]
    result["decode_tok_s"] = 1 / statistics.median(times)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
