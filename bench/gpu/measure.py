"""How fast is it on this device, beside its limits and llama.cpp? Writes measure.json. See README.md.

python bench/gpu/measure.py [--device CUDA0] [--kit gpu-kit] [--peer PYTHON] [--out DIR] [--seconds 350]

`--peer` is a Python with llama-cpp-python, as for bench/compare.py; `--peer kit` the one that was carried.
The models have random weights (bench/make_model.py) and stay in `--models` for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kit
from kit import Check, Failed, Found, Output, Report

BENCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCH))
import compare  # noqa: E402

MODELS = (("7b", "q4_k_m"), ("1b", "q4_k_m"), ("7b", "f16"), ("7b", "q8_0"), ("1b", "f16"), ("1b", "q8_0"))
SPACE = 40 << 30  # all of them and their towers


@dataclass(frozen=True)
class Plan:
    """The models and shapes to measure."""

    shapes: dict[str, tuple[str, int]]  # a model's name -> make_model's shape, and its n_embd
    tower: str
    prompts: tuple[int, int]
    predict: int
    batch: tuple[int, ...]
    cycles: int


FULL = Plan({"1b": ("1b", 2048), "7b": ("7b", 4096)}, "clip-l", (512, 2928), 32, (8, 32), 100)
TINY = Plan({"1b": ("tiny", 256), "7b": ("tiny", 256)}, "clip-tiny", (40, 90), 4, (2, 3), 4)


@dataclass
class Table:
    """Numbers by model and runtime, and the device's limits."""

    ours: dict[str, dict[str, float]] = field(default_factory=dict)
    theirs: dict[str, dict[str, float]] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)

    def rows(self, files: dict[str, Path], reached: bool) -> Iterator[str]:
        yield "| model | work | pyllava | of the limit | llama.cpp | ratio |"
        yield "|---|---|---|---|---|---|"
        for name, ours in self.ours.items():
            shares = compare.fractions(ours, self.limits, files[name]) if reached else {}
            theirs = self.theirs.get(name, {})
            for key, value in ours.items():
                share, other = shares.get(key), theirs.get(key)
                limit = f"{share[0] / share[1]:.0%} of {share[1]:g} {share[2]}" if share else "-"
                faster = "-"
                if other:
                    faster = f"{value / other if key.endswith('tok_s') else other / value:.2f}"
                shown = f"{other:.4g}" if other else "not measured"
                yield f"| {name} | {key} | {value:.4g} | {limit} | {shown} | {faster} |"


def model_file(folder: Path, plan: Plan, size: str, kind: str) -> Path:
    return folder / f"{plan.shapes[size][0]}-{kind}.gguf"


def tower_file(folder: Path, plan: Plan, size: str) -> Path:
    return folder / f"{plan.tower}-{plan.shapes[size][1]}-f16.gguf"


def chosen(only: str) -> list[tuple[str, str]]:
    return [(size, kind) for size, kind in MODELS if not only or f"{size} {kind}" in only.split(",")]


def write_models(folder: Path, plan: Plan, only: str) -> None:
    """Writes the models that are missing, all at once, each in a process."""
    wanted = {}
    for size, kind in chosen(only):
        shape, n_embd = plan.shapes[size]
        wanted[model_file(folder, plan, size, kind)] = ["--shape", shape, "--type", kind]
        flags = ["--shape", plan.tower, "--type", "f16", "--n-embd", str(n_embd)]
        wanted[tower_file(folder, plan, size)] = flags
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for path, flags in wanted.items():
        if not path.exists():
            part = path.with_suffix(".part")
            command = [sys.executable, str(BENCH / "make_model.py"), *flags, str(part)]
            running.append((subprocess.Popen(command, stdout=sys.stderr), part, path))
    for process, part, path in running:
        if process.wait():
            raise SystemExit(f"{path.name}: make_model.py failed")
        part.replace(path)
    print(json.dumps({"files_bytes": sum(path.stat().st_size for path in wanted)}))


def speed(only: str = "") -> kit.Callable[[Output], Found]:
    """The numbers of a run as in `pyllava-cli bench --json`; `only`: its prefill alone, under this name."""

    def read(output: Output) -> Found:
        found = compare.flat(dict(kit.json_line(output).numbers))
        found.pop("load_s", None)
        found.pop("peak_anon_bytes", None)
        if only:
            found = {only: found["prefill_tok_s"]}
        return Found(", ".join(f"{key} {value:.4g}" for key, value in found.items()), found)

    return read


def traced(output: Output) -> Found:
    numbers = kit.json_line(output).numbers
    found = ", ".join(f"{key} {numbers[key]}" for key in ("untraced_us", "step_us", "busy_us", "waits_us"))
    return Found(found, numbers)


def seconds_taken(output: Output) -> Found:
    kit.succeeded(output)
    return Found(f"{output.seconds:.2f} s", {"first_token_s": output.seconds})


def models_written(output: Output) -> Found:
    numbers = kit.json_line(output).numbers
    return Found(f"{numbers['files_bytes'] / 1e9:.2f} GB", numbers)


def limits_found(output: Output) -> Found:
    numbers = kit.json_line(output).numbers
    if "not_measured" in numbers:
        raise Failed(f"not measured: {numbers['not_measured']}")
    return Found(", ".join(f"{key} {value}" for key, value in numbers.items()), numbers)


def cycles_found(output: Output) -> Found:
    numbers = kit.json_line(output).numbers
    lost, grown = numbers["device_lost_bytes"] / 2**20, numbers["host_grown_bytes"] / 2**20
    text = f"{numbers['cycle_s']:.3g} s each, device memory lost {lost:.1f} MiB, host {grown:.1f} MiB"
    if numbers["answers"] != 1 or lost > 1:
        raise Failed(f"{text}, {numbers['answers']} different answers")
    return Found(text, numbers)


class Measurement:
    """The checks of one run, the most telling first."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report, self.table = options, report, Table()
        self.plan = TINY if options.tiny else FULL
        self.files = {f"{s} {k}": model_file(options.models, self.plan, s, k) for s, k in MODELS}
        self.limit = 60 * kit.patience(options.device)
        self.threads = min(os.cpu_count() or 1, 16)
        self.backends = ["--backends", kit.library_of(options.work).parent] if options.peer == "kit" else []
        if options.peer == "kit":
            options.peer = sys.executable
        self.layers = 0 if options.device.upper() == "CPU" else 99

    def run(self) -> None:
        here = Path(__file__)
        plan, models = self.plan, self.options.models
        more = ["--only", self.options.only, *(["--tiny"] if self.options.tiny else [])]
        limits = [sys.executable, here.parent / "limits.py", self.options.device]
        self.table.limits = dict(self.report.run(Check("limits", limits, self.limit, limits_found)).numbers)
        write = [sys.executable, here, "--write", models, *more]
        if (
            self.report.run(Check("models", write, 2 * self.limit, models_written, needed=True)).status
            != "ok"
        ):
            return
        models_of = chosen(self.options.only)
        if self.options.kernels:
            for size, kind in models_of:
                self.kernels(f"{size} {kind}")
            return
        for i, (size, kind) in enumerate(models_of):
            self.one_model(size, kind)
            if kind == "q4_k_m":
                self.views(size, kind)
            if i == 0:
                self.first_token(size, kind)
        cycles = [sys.executable, here.parent / "cycles.py", self.options.device, plan.cycles]
        self.report.run(Check(f"{plan.cycles} times load, answer, close", cycles, self.limit, cycles_found))
        for size, kind in (("1b", "q4_k_m"), ("7b", "f16")):
            if (size, kind) in models_of[1:]:
                self.first_token(size, kind)

    def both(self, what: str, name: str, ours: Check, theirs: Check) -> None:
        for check, rows in ((ours, self.table.ours), (theirs, self.table.theirs)):
            if check is theirs and not self.options.peer:
                continue
            line = self.report.run(check)
            if line.status != "ok":
                continue
            numbers = {key: float(value) for key, value in line.numbers.items() if key != "device_peak_mib"}
            if "device_peak_mib" in line.numbers and what:
                numbers[f"device_peak_mib{what}"] = line.numbers["device_peak_mib"]
            for key, value in numbers.items():
                rows.setdefault(name, {}).setdefault(key, value)

    def one_model(self, size: str, kind: str) -> None:
        """Decoding, prefill of both lengths, one view."""
        name, plan = f"{size} {kind}", self.plan
        mmproj = ["--mmproj", tower_file(self.options.models, plan, size)]
        for n, n_predict, batch, only in (
            (plan.prompts[0], plan.predict, ",".join(map(str, plan.batch)), ""),
            (plan.prompts[1], 2, "1", f"prefill_{plan.prompts[1]}_tok_s"),
        ):
            flags = ["-m", self.files[name], *([] if only else mmproj), "-p", n, "-n", n_predict]
            flags += ["-t", self.threads, "--batch", batch]
            ours = [sys.executable, "-m", "pyllava", "bench", *flags, "--repeat", 2, "--json"]
            theirs = [
                self.options.peer,
                BENCH / "peer_llama_cpp.py",
                *flags,
                "-ngl",
                self.layers,
                *self.backends,
            ]
            title = f"{name}, prompt {n}"
            self.both(
                f"_{n}",
                name,
                Check(title, ours, self.limit, speed(only)),
                Check(f"{title}, llama.cpp", theirs, self.limit, speed(only)),
            )
        if "encode_s" in self.table.theirs.get(name, {}):  # it takes views one by one
            self.table.theirs[name]["encode_5_s"] = 5 * self.table.theirs[name]["encode_s"]

    def kernels(self, name: str) -> None:
        """What a step is made of, of one sequence and of the most; llama.cpp's time for it."""
        for n in (1, self.plan.batch[-1]):
            worker = [
                sys.executable,
                Path(__file__).parent / "kernels.py",
                self.files[name],
                "--sequences",
                n,
            ]
            worker += ["--device", self.options.device]
            self.report.run(Check(f"{name}, a step of {n}", worker, self.limit, traced))
            if self.options.peer:
                peer = [self.options.peer, BENCH / "peer_llama_cpp.py", "-m", self.files[name], "-p", 64]
                peer += ["-n", self.plan.predict, "-t", self.threads, "-ngl", self.layers, *self.backends]
                peer += ["--batch", n, "--batch-prompt", self.plan.prompts[0]]
                self.report.run(Check(f"{name}, a step of {n}, llama.cpp", peer, self.limit, speed()))

    def views(self, size: str, kind: str) -> None:
        """One view and five in one batch, by the tower alone."""
        name = f"{size} {kind}"
        worker = [sys.executable, BENCH / "our_views.py", "-m", self.files[name], "-t", self.threads]
        worker += ["--mmproj", tower_file(self.options.models, self.plan, size)]
        line = self.report.run(Check(f"{name}, one view, five", worker, self.limit, speed()))
        if line.status == "ok":
            self.table.ours.setdefault(name, {})["encode_5_s"] = line.numbers["encode_5_s"]

    def first_token(self, size: str, kind: str) -> None:
        """From the start of the process to its end after one token, the files in the page cache."""
        name = f"{size} {kind}"
        asked = argparse.Namespace(
            model=self.files[name], mmproj=tower_file(self.options.models, self.plan, size), t=self.threads,
            ngl=self.layers, peer=self.options.peer,
        )  # fmt: skip
        title = f"{name}, first token"
        ours = Check(title, compare.ask(asked), self.limit, seconds_taken)
        peer = [*compare.peer_ask(asked), *self.backends]
        theirs = Check(f"{title}, llama.cpp", peer, self.limit, seconds_taken)
        self.both("", name, ours, theirs)


def default_models(work: Path) -> Path:
    """In memory if there is room, so that no disk is measured."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > SPACE:
        return memory / work.name
    return work / "models"


def main() -> int:
    parser = kit.parser(__doc__, 350)
    parser.add_argument("--peer", help="a Python with llama-cpp-python, or `kit`")
    parser.add_argument("--models", type=Path, help="where the models are written")
    parser.add_argument(
        "--only", default="", metavar="NAMES", help="of models, with commas: '7b f16,1b q8_0'"
    )
    parser.add_argument("--kernels", action="store_true", help="only what a step of decoding is made of")
    parser.add_argument("--write", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_models(options.write, TINY if options.tiny else FULL, options.only)
        return 0
    options.models = (options.models or default_models(options.work)).resolve()
    os.environ["PYLLAVA_DEVICE"] = options.device
    report = kit.begin(options, "measure")
    measurement = Measurement(options, report)
    measurement.run()
    os.environ["PYLLAVA_LIBRARY"] = report.environment["PYLLAVA_LIBRARY"]  # reads the sizes of the matrices
    sys.path.insert(0, str(kit.ROOT))
    rows = list(measurement.table.rows(measurement.files, reached=not options.tiny))
    report.facts["table"] = rows
    report.write()
    print("\n".join(["", *(["tiny models: these numbers say nothing"] if options.tiny else []), *rows, ""]))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
