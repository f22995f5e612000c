"""The limits of a device: bytes copied within its memory, 16-bit and 8-bit matrix products, as JSON.

python bench/gpu/limits.py CUDA0|CPU. CUDA's are measured with PyTorch, the CPU's as in bench/compare.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare

WARM, REPEAT = 3, 10


def cuda(index: int) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"not_measured": "this PyTorch finds no CUDA device"}
    torch.cuda.set_device(index)

    def seconds(work: Callable[[], object]) -> float:
        for _ in range(WARM):
            work()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(REPEAT):
            work()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / REPEAT / 1e3

    found: dict[str, Any] = {"name": torch.cuda.get_device_name()}
    n_bytes, n = 4 << 30, 8192
    source = torch.ones(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["read_gb_s"] = round(2 * n_bytes / seconds(lambda: target.copy_(source)) / 1e9)  # read and written
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    found["bf16_gflops"] = round(2 * n**3 / seconds(lambda: torch.matmul(a, b, out=out)) / 1e9)
    a, b = (torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    found["int8_gops"] = round(2 * n**3 / seconds(lambda: torch._int_mm(a, b.t())) / 1e9)
    return found


def main() -> None:
    device = sys.argv[1]
    number = re.fullmatch(r"CUDA(\d+)", device)
    if number:
        try:
            found = cuda(int(number[1]))
        except ImportError as error:
            found = {"not_measured": str(error)}
    elif device.upper() == "CPU":
        found = compare.limits(min(os.cpu_count() or 1, 64)) or {"not_measured": "no C compiler"}
    else:
        found = {"not_measured": f"nothing here measures {device}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
