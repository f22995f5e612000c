"""Load, answer, close, again and again: is the answer the same, does memory come back? One JSON object.

python bench/gpu/cycles.py DEVICE N
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyllava

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "scene.png"
SETTLED = 2  # cycles after which nothing may grow


def free(device: str) -> int:
    return next((d.memory_free for d in pyllava.devices() if d.name == device), 0)


def resident() -> int:
    """Of this process, besides mapped files; Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


def main() -> None:
    device, n = sys.argv[1], int(sys.argv[2])
    answers, device_free, host = set(), [], []
    started = time.perf_counter()
    for _ in range(n):
        with pyllava.Llava(device=device) as model:
            answers.add(str(model.ask(PICTURE, "How many shapes are there?")))
        device_free.append(free(device))
        host.append(resident())
    settled = min(SETTLED, n - 1)
    found = {
        "cycle_s": (time.perf_counter() - started) / n,
        "answers": len(answers),
        "device_lost_bytes": device_free[settled] - device_free[-1],
        "host_grown_bytes": host[-1] - host[settled],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
