"""pyllava's image encoder on one view and on five, in the form of peer_torch.py; see compare.py."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from pyllava import _lib

REPEAT = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True)
    parser.add_argument("--mmproj", required=True)
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--precision", default="fast")
    options = parser.parse_args()
    model = _lib.ModelHandle(options.m, options.mmproj)
    session = _lib.SessionHandle(model, n_ctx=64, n_threads=options.t, n_views=5, precision=options.precision)
    result = {}
    for name, n_views in (("encode_s", 1), ("encode_5_s", 5)):
        pixels = np.random.RandomState(0).standard_normal((n_views, 3, 336, 336)).astype(np.float32)
        times = []
        for _ in range(REPEAT + 1):
            started = time.perf_counter()
            session.encode(pixels)
            times.append(time.perf_counter() - started)
        result[name] = statistics.median(times[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
