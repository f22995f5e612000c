"""Side by side with llama.cpp on the same files, threads and sizes: alternating runs, medians, ratios.

python bench/compare.py --model LLM.gguf [--mmproj MMPROJ.gguf] [-p 512] [-n 32] [--batch 1,8] [--rounds 3]
                        [--peer PYTHON] [--torch PYTHON] [--precision fast]

`--peer` is a Python with llama-cpp-python, `--torch` one with torch and transformers (CLIP-L/14-336 in bfloat16, 23
layers); both may be this one. Every run is a process of its own, so that no thread pool disturbs another. llama.cpp's
image encoder is measured through its own multimodal library.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]


def run(python: str, *arguments: object) -> Result:
    """What a worker prints last, as JSON."""
    command = [python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def flat(result: Result) -> dict[str, float]:
    rows = {
        k: float(v) for k, v in result.items() if k.endswith(("_s", "_bytes")) and isinstance(v, (int, float))
    }
    return rows | {f"decode_{k}_tok_s": float(v) for k, v in result.get("decode_batch_tok_s", {}).items()}


def medians(results: list[Result]) -> dict[str, float]:
    rows = [flat(result) for result in results]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} if rows else {}


def table(ours: dict[str, float], theirs: dict[str, float], name: str) -> str:
    lines = [f"{'':<20}{'pyllava':>12}{name:>14}{'ratio':>8}"]
    for key in ours:
        if key not in theirs:
            continue
        faster = ours[key] / theirs[key] if key.endswith("tok_s") else theirs[key] / ours[key]
        lines.append(f"{key:<20}{ours[key]:>12.4g}{theirs[key]:>14.4g}{faster:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--torch", help="also measure PyTorch in bfloat16 with this Python")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    mmproj = ["--mmproj", options.mmproj] if options.mmproj else []
    common = [
        "-m",
        options.model,
        *mmproj,
        "-p",
        options.p,
        "-n",
        options.n,
        "-t",
        options.t,
        "--batch",
        options.batch,
    ]
    ours, theirs, torch = [], [], []
    for _ in range(options.rounds):
        bench = ["-m", "pyllava", "bench", *common, "--precision", options.precision, "--repeat", 2, "--json"]
        ours.append(run(sys.executable, *bench))
        theirs.append(run(options.peer, HERE / "peer_llama_cpp.py", *common))
        if options.torch:
            torch.append(run(options.torch, HERE / "peer_torch.py", "-t", options.t))
    if options.json:
        print(json.dumps({"pyllava": ours, "llama.cpp": theirs, "torch": torch}))
        return
    print(table(medians(ours), medians(theirs), "llama.cpp"))
    if torch:
        print(table(medians(ours), medians(torch), "torch bf16"))


if __name__ == "__main__":
    main()
