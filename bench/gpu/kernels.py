"""What a step of decoding is made of on an NVIDIA GPU: the time of each kernel and copy, and how long it waits.

python bench/gpu/kernels.py MODEL [--device CUDA0] [--sequences 1] [--steps 32]

Each sequence follows a prompt of 512 tokens. PyTorch's profiler (CUPTI) sees what the GPU does for this process,
whoever asks for it. One JSON object; times in microseconds per step.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_PROMPT = 512
N_CTX = 1024
WARM = 8  # steps before those that are traced


def steps_of(options: argparse.Namespace) -> Callable[[], object]:
    from pyllava import _lib

    plan = _lib.SessionOptions(n_ctx=N_CTX, n_batch=512, n_views=1, precision="fast", flash_attn=None)
    placement = _lib.Placement(device=options.device, plan_for=plan)
    model = _lib.ModelHandle(Path(options.model), None, placement=placement)
    session = _lib.SessionHandle(
        model, n_ctx=N_CTX, n_batch=512, n_seq=options.sequences, n_threads=8, n_views=1, precision="fast"
    )
    ids = prompt()
    for sequence in range(options.sequences):
        session.prefill([_lib.Tokens(ids)], seq=sequence)
    return lambda: session.decode([ids[0]] * options.sequences, seqs=list(range(options.sequences)))


def prompt() -> list[int]:
    return [int(i) for i in np.random.RandomState(0).randint(300, 30000, N_PROMPT)]


def short(name: str) -> str:
    """A kernel's name without its return type, name spaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    return name.split("(")[0][:90]


def summary(events: list[Any], n_steps: int, wall: float) -> dict[str, Any]:
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events)
    by_name: dict[str, list[float]] = {}
    waits, first, last = 0, spans[0][0], spans[0][0]
    for start, end, name in spans:
        total = by_name.setdefault(short(name), [0, 0])
        total[0] += (end - start) / 1e3 / n_steps
        total[1] += 1 / n_steps
        waits += max(0, start - last)
        last = max(last, end)
    rows = sorted(by_name.items(), key=lambda item: -item[1][0])
    return {
        "step_us": round(wall / n_steps * 1e6, 1),
        "busy_us": round((last - first - waits) / 1e3 / n_steps, 1),
        "waits_us": round(waits / 1e3 / n_steps, 1),
        "kernels": [[name, round(us, 1), round(n, 2)] for name, (us, n) in rows[:30]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--device", default="CUDA0")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    step = steps_of(options)
    for _ in range(WARM):
        step()
    times = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        step()
        started = time.perf_counter()
        for _ in range(options.steps):
            step()
        wall = time.perf_counter() - started
    seen = found.profiler.kineto_results.events()  # the host's calls among them
    events = [event for event in seen if event.device_type() == DeviceType.CUDA]
    result = {
        "untraced_us": round(float(np.median(times)) * 1e6, 1),
        **summary(events, options.steps + 2, wall),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
