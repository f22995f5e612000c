"""Shared by check.py and measure.py: checks in separate processes, a table, a JSON file, the kit's setup.

A check that fails, crashes or runs out of its time is a line of the table; what no longer fits into the time
of all is skipped, with a line that says so. `setup` unpacks the folder that prepare.py made and builds
libpyllava from the sources as they are, with the back end's plug-in beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LEAST = 5.0  # seconds: with less, a check is not begun
KEPT = 6000  # characters of the output of a check that failed, for the JSON file


class Failed(Exception):
    """Why a check that ended by itself has failed."""


@dataclass(frozen=True)
class Output:
    """Output and exit status of a process."""

    status: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a check has shown, in words and numbers."""

    detail: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A command, its time limit in seconds, a reader of its output; `needed`: if it fails, skip the rest."""

    name: str
    command: Sequence[object]
    seconds: float
    read: Callable[[Output], Found]
    needed: bool = False


@dataclass(frozen=True)
class Line:
    """The result of a check: ok, failed, timeout or skipped."""

    name: str
    status: str
    seconds: float
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""


def json_line(output: Output) -> Found:
    """The result of a worker that prints one JSON object last."""
    succeeded(output)
    try:
        numbers = json.loads(output.out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise Failed("no JSON at the end of its output") from None
    return Found(numbers=numbers)


def succeeded(output: Output) -> None:
    if output.status:
        last = [line for line in (output.err.strip() or output.out.strip()).splitlines() if line][-1:]
        how = (
            f"signal {signal.Signals(-output.status).name}"
            if output.status < 0
            else f"exit status {output.status}"
        )
        raise Failed(": ".join([how, *last])[:300])


def tests(output: Output) -> Found:
    """The result of pytest -q -rfE: how many tests passed, and which did not."""
    lines = output.out.strip().splitlines()
    counts = {
        word: int(n)
        for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", (lines or [""])[-1])
    }
    words = ", ".join(f"{n} {word}" for word, n in counts.items())
    if output.status or not counts.get("passed"):
        names = [
            line.split("::", 1)[-1].split(" - ")[0] for line in lines if re.match(r"(FAILED|ERROR) ", line)
        ]
        if not words:
            succeeded(output)
        raise Failed(f"{words or 'nothing ran'}: {', '.join(names)}" if names else words or "nothing ran")
    return Found(words, counts)


def run(check: Check, environment: Mapping[str, str], limit: float) -> Line:
    """One check, with all that it started ended at the end."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                [str(word) for word in check.command], cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Line(check.name, "failed", 0.0, str(error))
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            err.seek(0, os.SEEK_END)
            err.write(stacks(process.pid))
        finally:
            seconds = time.monotonic() - started
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    shown = "\n".join(texts)[-KEPT:]
    if status is None:
        return Line(check.name, "timeout", seconds, f"not done after {limit:.0f} s", output=shown)
    try:
        found = check.read(Output(status, *texts, seconds))
    except Failed as error:
        return Line(check.name, "failed", seconds, str(error), output=shown)
    except Exception as error:  # what cannot be read is a line as well
        return Line(check.name, "failed", seconds, f"{type(error).__name__}: {error}", output=shown)
    return Line(check.name, "ok", seconds, found.detail, found.numbers)


def stacks(pid: int) -> bytes:
    """The C stacks of a process's threads; b"" without a debugger."""
    for debugger in ("gdb", "cuda-gdb"):
        if shutil.which(debugger):
            command = [debugger, "-p", str(pid), "-batch", "-ex", "thread apply all bt 12"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                return subprocess.run(command, capture_output=True, timeout=20).stdout
    return b""


class Report:
    """Runs checks in order until the time is up; prints a line for each and updates the JSON file."""

    def __init__(
        self, path: Path, seconds: float, environment: Mapping[str, str], facts: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.until = time.monotonic() + seconds
        self.environment = environment
        self.facts = dict(facts)
        self.lines: list[Line] = []
        self.lost = ""
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{'check':<42}{'':<9}{'s':>6}  result")

    def run(self, check: Check) -> Line:
        with peak_memory() as peak:
            line = self.attempt(check)
        if peak and line.status != "skipped":
            line = Line(**{**vars(line), "numbers": {**line.numbers, "device_peak_mib": peak["mib"]}})
        if check.needed and line.status != "ok":
            self.lost = self.lost or f"after: {check.name}"
        self.add(line)
        return line

    def attempt(self, check: Check) -> Line:
        """A check's line, which is not in the table yet; from any thread."""
        left = self.until - time.monotonic()
        if self.lost or left < LEAST:
            return Line(check.name, "skipped", 0.0, self.lost or "no time left")
        return run(check, self.environment, min(check.seconds, left))

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(f"{line.name:<42}{line.status:<9}{line.seconds:>6.1f}  {line.detail}", flush=True)
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        table = {**self.facts, "checks": [asdict(line) for line in self.lines]}
        part.write_text(json.dumps(table, indent=1) + "\n")
        part.replace(self.path)

    def close(self) -> int:
        """The exit status: 0 if every check passed."""
        count = dict.fromkeys(("ok", "failed", "timeout", "skipped"), 0)
        for line in self.lines:
            count[line.status] += 1
        print(", ".join(f"{n} {status}" for status, n in count.items() if n), f"-> {self.path}", flush=True)
        return int(count["ok"] < len(self.lines))


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Inside the block: the most MiB in use on the first NVIDIA GPU beyond those before; {} without one."""
    found: dict[str, int] = {}
    command = [
        "nvidia-smi",
        "--query-gpu=memory.used",
        "--format=csv,noheader,nounits",
        "--id=0",
        "-lms",
        "100",
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return
    samples: list[int] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                samples.append(int(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield found
    finally:
        process.kill()
        process.wait()
        reader.join(2)
        if samples:
            found["mib"] = max(samples) - min(samples)


# The kit's folder


def library_of(work: Path) -> Path:
    return work / "install" / "pyllava" / "lib" / "libpyllava.so"


def unpack(kit: Path, work: Path) -> list[Path]:
    """The plug-ins that were carried."""
    plugins = []
    for packed in sorted(kit.glob("*.so.xz")):
        target = work / packed.stem
        if not target.exists() or target.stat().st_mtime < packed.stat().st_mtime:
            part = target.with_suffix(".part")
            with lzma.open(packed) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            part.replace(target)
        plugins.append(target)
    for wheel in kit.glob("*.whl"):  # pure Python: a folder to be found in
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "site")
    if (kit / "peer.tar.xz").exists():
        with tarfile.open(kit / "peer.tar.xz") as archive:
            archive.extractall(work / "peer")
    return plugins


def setup(kit: Path, work: Path) -> dict[str, Any]:
    """Builds libpyllava in `work`, on a second call only what has changed, and adds the carried plug-ins."""
    started = time.monotonic()
    made = json.loads((kit / "kit.json").read_text())
    if made["ggml"] != pinned_ggml():
        raise SystemExit(f"{kit} was made for another ggml: run bench/gpu/prepare.py again")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "ggml").exists():
        with tarfile.open(kit / "ggml.tar.xz") as archive:
            archive.extractall(work / "ggml.part")
        (work / "ggml.part").rename(work / "ggml")
    with ThreadPoolExecutor() as pool:
        unpacking = pool.submit(unpack, kit, work)
        configure = [
            "cmake", "-S", ROOT, "-B", work / "build", "-DPYLLAVA_PLUGINS=ON", "-DGGML_CPU_ALL_VARIANTS=OFF",
            f"-DPYLLAVA_GGML_SOURCE={work / 'ggml'}", *(["-G", "Ninja"] if shutil.which("ninja") else []),
        ]  # fmt: skip
        build = ["cmake", "--build", work / "build", "-j", os.cpu_count() or 1]
        install = ["cmake", "--install", work / "build", "--prefix", work / "install"]
        for command in (configure, build, install):
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        plugins = unpacking.result()
    beside = library_of(work).parent
    for plugin in plugins:
        shutil.copy2(plugin, beside)
    for part in (
        ("ggml", "ggml-base") if (work / "peer").exists() else ()
    ):  # by the names that llama_cpp asks for
        link = work / "peer" / "llama_cpp" / "lib" / f"lib{part}.so"
        (found,) = beside.glob(f"libpyllava-{part}-[0-9]*.so")
        link.unlink(missing_ok=True)
        link.symlink_to(found)
    return {"setup_s": round(time.monotonic() - started, 1), "plugins": [plugin.name for plugin in plugins]}


def pinned_ggml() -> str:
    text = (ROOT / "ggml" / "fetch.cmake").read_text()
    return re.findall(r"set\(GGML_SHA256 (\w+)\)", text)[0]


# The command line


def parser(text: str | None, seconds: int) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--device", default="CUDA0", help="default: CUDA0; Vulkan0, CPU and so on for a dry run")
    add("--kit", type=Path, default=ROOT / "gpu-kit", help="the folder that prepare.py made")
    add("--library", type=Path, help="this libpyllava instead: nothing is unpacked or built")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "pyllava-gpu", help="what is built")
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="where the JSON file goes")
    add("--seconds", type=float, default=seconds, help=f"for everything (default: {seconds})")
    add("--tiny", action="store_true", help="for a dry run: little of everything")
    return options


def patience(device: str) -> float:
    """How much longer a check may take than on an idle GPU: a dry run computes on a few cores."""
    return 1 if device.startswith("CUDA") else 8


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Variables for the checks: library, device, and the folders of CUDA's libraries in Python packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    libraries = [str(folder) for place in places for folder in sorted(place.glob("c*/lib"))]
    before = os.environ
    carried = getattr(options, "peer", None) == "kit"
    paths = {
        "PATH": [str(Path(sys.executable).parent)],
        "PYTHONPATH": [
            str(ROOT),
            str(options.work / "site"),
            *([str(options.work / "peer")] if carried else []),
        ],
        "LD_LIBRARY_PATH": [*libraries, *([str(library_of(options.work).parent)] if carried else [])],
    }
    joined = {
        name: os.pathsep.join([*first, *filter(None, [before.get(name)])]) for name, first in paths.items()
    }
    return {
        **before,
        **joined,
        "PYLLAVA_LIBRARY": str(options.library or library_of(options.work)),
        "PYLLAVA_TEST_DEVICES": options.device,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",  # else transformers waits for a network that is not there
    }


def begin(options: argparse.Namespace, name: str) -> Report:
    """The report, with the library built."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.work, options.kit, options.out = (
        path.resolve() for path in (options.work, options.kit, options.out)
    )
    facts = {"device": options.device, "tiny": options.tiny, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    report = Report(options.out / f"{name}.json", options.seconds, environment(options), facts)
    if not options.library:
        build = [sys.executable, Path(__file__), options.kit, options.work]
        report.run(Check("build", build, 150 * patience(options.device), built, needed=True))
    listing = [sys.executable, "-m", "pyllava", "--list-devices"]
    report.run(
        Check(
            "devices",
            listing,
            30 * patience(options.device),
            lambda output: named(output, options.device),
            needed=True,
        )
    )
    return report


def built(output: Output) -> Found:
    numbers = json_line(output).numbers
    return Found(f"plug-ins: {', '.join(numbers['plugins']) or 'none'}", numbers)


def named(output: Output, device: str) -> Found:
    """The line of --list-devices that is about the device."""
    succeeded(output)
    lines = [line for line in output.out.splitlines() if line.startswith(f"{device}:")]
    if not lines:
        there = ", ".join(line.split(":")[0] for line in output.out.splitlines())
        raise Failed(f"no {device} here, but {there}: {output.err.strip()}")
    return Found(lines[0], {"device": lines[0]})


if __name__ == "__main__":
    print(json.dumps(setup(Path(sys.argv[1]), Path(sys.argv[2]))))
