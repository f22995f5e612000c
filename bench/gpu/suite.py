"""The project's tests with everything on the device that can be there: what fails besides the exact gates? (README.md)

python bench/gpu/suite.py [--device CUDA0] [--kit gpu-kit] [--out DIR] [--seconds 240] [--jobs 12] [FILE ...]
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check
import kit
from kit import ROOT

APART = {"test_devices.py"}  # check.py runs it


def files() -> list[Path]:
    """Those of the tests, the longest first: what ends last decides how long all of it takes."""
    found = [path for path in (ROOT / "tests").glob("test_*.py") if path.name not in APART]
    return sorted(found, key=lambda path: -path.stat().st_size)


def main() -> int:
    options = kit.parser(__doc__, 240)
    options.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="files at a time (default: one per core)"
    )
    options.add_argument(
        "files", nargs="*", type=Path, help="of the tests; default: all but " + ", ".join(APART)
    )
    options = options.parse_args()
    os.environ["PYLLAVA_DEVICE"] = options.device
    report = kit.begin(options, "suite")
    checks = [check.pytest(path.name, options.seconds, str(path)) for path in options.files or files()]
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(report.attempt, checks):
            report.add(line)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
