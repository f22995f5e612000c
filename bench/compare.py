"""Side by side with other runtimes on the same files, threads and sizes: alternating runs, medians, ratios.

python bench/compare.py --model LLM.gguf [--mmproj MMPROJ.gguf] [-p 512] [-n 32] [--batch 1,8] [--rounds 3]
                        [--peer PYTHON] [--torch PYTHON] [--openvino PYTHON [--openvino-lm DIR]]
                        [--first-token] [--chart OUT.svg] [-ngl N]

- `--peer`: a Python with llama-cpp-python. llama.cpp's image encoder is measured through its own multimodal
  library, which takes views one by one.
- `--torch`: a Python with torch and transformers, for the image encoder (CLIP-L/14-336, 23 layers, in
  bfloat16 where the CPU multiplies it, else in float32); with `--mmproj`.
- `--openvino`: a Python with torch, transformers and openvino, likewise.
- `--openvino-lm`: the folder of a language model of the same shape in int4, from make_openvino_lm.py.
- `--first-token`: the time from the start of the process to the first token of an answer about a picture
  (text of about 48 tokens, a context of 2048), and the most memory that the process held besides mapped
  files (Linux).

Every run is a process of its own, so that no thread pool disturbs another. The machine's limits come from
limits.c, compiled with `cc`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]


def run(python: str, *arguments: object) -> Result:
    """Runs a worker; returns the JSON that it prints last."""
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


def limits(n_threads: int) -> Result:
    """Products per second and read bandwidth of the machine, or nothing without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        build = ["cc", "-O2", "-march=native", "-pthread", str(HERE / "limits.c"), "-o", str(program)]
        try:
            subprocess.run(build, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        return run(str(program), n_threads)


def fractions(ours: dict[str, float], machine: Result, model: Path) -> dict[str, tuple[float, float, str]]:
    """What prefill, decoding and encoding reach, and the machine's limit for each, by the names of `flat`."""
    found = {}
    size, matrices = model.stat().st_size, matrices_of(model)
    numbers = sum(n for n, _ in matrices)
    halves = matrices[0][1] in ("f16", "bf16")
    bits16 = next((name for name in ("bf16_gflops", "int16_gops") if name in machine), "")
    product = bits16 if halves else "int8_gops"
    for key, value in ours.items():
        decode = re.fullmatch(r"decode_(?:(\d+)_)?tok_s", key)
        views = re.fullmatch(r"encode_(?:(\d+)_)?s", key)
        if decode and "read_gb_s" in machine:
            rate = value / int(decode[1] or 1) * size / 1e9
            found[key] = (rate, machine["read_gb_s"], "GB/s")
        elif key.startswith("prefill") and product in machine:
            unit = "16-bit GOP/s" if halves else "int8 GOP/s"
            found[key] = (2 * numbers * value / 1e9, machine[product], unit)
        elif views and bits16:
            n, d, f = 577, 1024, 4096
            flops = 23 * (2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d) * int(views[1] or 1)
            found[key] = (flops / value / 1e9, machine[bits16], "16-bit GOP/s")
    return found


def matrices_of(path: Path) -> list[tuple[int, str]]:
    """Number of elements and type of the matrices that every token of a prompt is multiplied with."""
    from pyllava.gguf import GgufFile

    tensors = [t for t in GgufFile(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return [(math.prod(t.shape), t.type) for t in tensors]


def alone(options: argparse.Namespace) -> list[str]:
    """Options for pyllava only: without layers on the GPU, llama.cpp is kept from using it at all."""
    return [] if options.ngl else ["--device", "cpu"]


def ask(options: argparse.Namespace) -> list[object]:
    """The command of one token of an answer about a picture."""
    picture = HERE.parent / "examples" / "scene.png"
    prompt = "Describe the picture in a few words, and say what is at its left and at its right side."
    flags = ["-m", options.model, "--mmproj", options.mmproj, "-t", options.t, "-ngl", options.ngl]
    flags += [*alone(options), "-c", 2048, "-n", 1, "--image", picture, "-p", prompt]
    return [sys.executable, "-m", "pyllava", *flags]


def peer_ask(options: argparse.Namespace) -> list[object]:
    flags = ["-m", options.model, "--mmproj", options.mmproj, "-t", options.t, "-ngl", options.ngl]
    return [options.peer, HERE / "peer_llama_cpp.py", *flags, "--first-token"]


def first_token(options: argparse.Namespace) -> tuple[list[Result], list[Result]]:
    """Seconds from starting the process to the first token, and its memory."""
    ours: list[Result] = []
    theirs: list[Result] = []
    for _ in range(options.rounds):
        for results, command in ((ours, ask(options)), (theirs, peer_ask(options))):
            results.append(timed([str(part) for part in command]))
    return ours, theirs


def timed(command: list[str]) -> Result:
    """Seconds that a command takes, and the most memory that it holds besides mapped files."""
    started, anon = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            anon = max(anon, int(line.split()[1]) << 10)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return {"first_token_s": time.perf_counter() - started, "peak_anon_bytes": anon}


def chart(path: Path, rows: list[tuple[str, dict[str, float], dict[str, float]]]) -> None:
    """Bars: how many times faster than each other runtime."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    bars = []
    for name, ours, theirs in rows:
        for key in ours:
            if key in theirs and key != "load_s" and not key.endswith("bytes"):
                faster = ours[key] / theirs[key] if key.endswith("tok_s") else theirs[key] / ours[key]
                bars.append((f"{key.removesuffix('_tok_s').removesuffix('_s')}, {name}", faster))
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(bars) + 1), layout="constrained")
    drawn = axes.barh([bar[0] for bar in bars][::-1], [bar[1] for bar in bars][::-1])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast")
    figure.savefig(path)


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
    parser.add_argument("-ngl", type=int, default=0, help="layers on the GPU, on both sides (default: 0)")
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--torch", help="also measure PyTorch with this Python")
    parser.add_argument("--openvino", help="also measure OpenVINO with this Python")
    parser.add_argument(
        "--openvino-lm",
        type=Path,
        metavar="DIR",
        help="also measure this language model (make_openvino_lm.py)",
    )
    parser.add_argument(
        "--first-token", action="store_true", help="only from process start to the first token"
    )
    parser.add_argument("--chart", type=Path, help="draw the ratios (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.openvino_lm and not options.openvino:
        parser.error("--openvino-lm: need --openvino")
    if not options.mmproj and (options.torch or (options.openvino and not options.openvino_lm)):
        parser.error("--torch, --openvino: need --mmproj")
    if options.first_token:
        if options.mmproj is None:
            parser.error("--first-token: need --mmproj")
        ours, theirs = first_token(options)
        print(table(medians(ours), medians(theirs), "llama.cpp"))
        return
    mmproj = ["--mmproj", options.mmproj] if options.mmproj else []
    common = ["-m", options.model, *mmproj, "-p", options.p, "-n", options.n, "-t", options.t]
    common += ["--batch", options.batch, "-ngl", options.ngl]
    views: dict[str, tuple[str, str]] = {}
    if options.torch and options.mmproj:
        views["PyTorch"] = (options.torch, "peer_torch.py")
    if options.openvino and options.mmproj:
        views["OpenVINO"] = (options.openvino, "peer_openvino.py")
    ours, theirs, openvino_lm, our_views = [], [], [], []
    other_views: dict[str, list[Result]] = {name: [] for name in views}
    machine = limits(options.t)
    for _ in range(options.rounds):
        bench = ["-m", "pyllava", "bench", *common, "--precision", options.precision, "--repeat", 2, "--json"]
        bench += alone(options)
        ours.append(run(sys.executable, *bench))
        theirs.append(run(options.peer, HERE / "peer_llama_cpp.py", *common))
        if options.openvino_lm:
            sizes = ["-p", options.p, "-n", options.n, "-t", options.t]
            openvino_lm.append(
                run(options.openvino, HERE / "peer_openvino_lm.py", options.openvino_lm, *sizes)
            )
        if views:
            flags = ["-m", options.model, *mmproj, "-t", options.t, "--precision", options.precision]
            our_views.append(run(sys.executable, HERE / "our_views.py", *flags))
        for name, (python, worker) in views.items():
            other_views[name].append(run(python, HERE / worker, "-t", options.t))
    if options.json:
        results = {"pyllava": ours, "llama.cpp": theirs, "OpenVINO language model": openvino_lm}
        print(json.dumps(results | {"views": our_views, **other_views, "machine": machine}))
        return
    rows = [("llama.cpp", medians(ours), medians(theirs))]
    if openvino_lm:
        rows.append(("OpenVINO int4", medians(ours), medians(openvino_lm)))
    rows += [
        (f"{name} {results[0]['precision']}", medians(our_views), medians(results))
        for name, results in other_views.items()
    ]
    for name, mine, other in rows:
        print(table(mine, other, name))
    if machine and not options.ngl:
        for key, (rate, limit, unit) in fractions(medians(ours), machine, options.model).items():
            print(f"{key:<20}{rate:>12.1f} of {limit:g} {unit}: {rate / limit:.0%}")
    if options.chart:
        chart(options.chart, rows)


if __name__ == "__main__":
    main()
