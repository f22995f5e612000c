"""What a report of a fault needs to tell of an installation, on one page, and whether it works.

No private data beyond paths: nothing of models, pictures or questions is looked at, and of the environment only what steers
pyllava. The home folder is written ``~``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import _doctor_probe
from ._doctor_probe import Section, tried
from ._plain import plain
from ._version import __version__

PRIVACY = "No pictures, questions or models are in here; paths are, with the home folder as ~."
_SECONDS = 120.0  # for the library's part
_OF_DEVICES = re.compile(r"\w+_VISIBLE_DEVICES|GGML_\w+|NO_COLOR")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS", re.IGNORECASE)


def report() -> dict[str, Section]:
    """The page: sections by name. A section that could not be made has an "error" and says why."""
    page: dict[str, Section] = {
        "versions": tried(_versions),
        "environment": tried(_environment),
        "processor": tried(_processor),
        "memory": tried(_memory),
        "pictures": tried(_pictures),
        "optional_packages": tried(_optional),
        **_of_library(),
    }
    return {name: _anonymous(section) for name, section in page.items()}


def is_sound(page: Mapping[str, Section]) -> bool:
    """Whether the library could be loaded, and the demo gave the right answers."""
    return all("error" not in page.get(name, {"error": "missing"}) for name in ("library", "self_test"))


def _anonymous(value: Any) -> Any:
    """The same with ~ for the home folder in all texts."""
    if isinstance(value, dict):
        return {key: _anonymous(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_anonymous(each) for each in value]
    home = os.path.expanduser("~").rstrip("/")
    if not isinstance(value, str) or not home:
        return value
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", value)


# --- the library ---


def _of_library() -> dict[str, Section]:
    """Its sections, from a process that may crash: a library built for another CPU ends the one that loads it."""
    if getattr(sys, "frozen", False) or not sys.executable:  # a program of its own has no Python to start
        return dict(_doctor_probe.sections())
    try:
        stdout, stderr, code = _ran()
    except OSError as error:  # no process could be started
        return {"library": {"error": f"not looked at: {sys.executable}: {error.strerror}"}}
    found: dict[str, Section] = {}
    for line in stdout.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # others may print, too
            found.update(json.loads(line))
    if code != 0:
        name = next((name for name in _doctor_probe.NAMES if name not in found), _doctor_probe.NAMES[-1])
        last = [plain(line) for line in stderr.splitlines()[-5:]]
        found[name] = {"error": _ending(code), **({"its_last_words": last} if last else {})}
    return found


def _ran() -> tuple[str, str, int | None]:
    """stdout, stderr and exit code of that process; None: it did not end in time."""
    try:
        ran = subprocess.run(
            _doctor_probe.command(),
            capture_output=True,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        stdout, stderr, code = ran.stdout, ran.stderr, ran.returncode
    except subprocess.TimeoutExpired as late:
        stdout, stderr, code = late.stdout or b"", late.stderr or b"", None
    return stdout.decode(errors="replace"), stderr.decode(errors="replace"), code


def _ending(code: int | None) -> str:
    if code is None:
        return f"it did not end within {_SECONDS:.0f} s"
    if code > 0:
        return f"the process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    advice = ": the library was built for another CPU; build it on this machine" if name == "SIGILL" else ""
    return f"the process was ended by {name}{advice}"


# --- all else ---


def _versions() -> Section:
    return {
        "pyllava": f"{__version__} in {Path(__file__).parent}",
        "installed_as": _version("pyllava") or "nothing: a source tree",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}",
        **{name: _version(name) or "missing: pyllava needs it" for name in ("numpy", "pillow", "tqdm")},
        "system": f"{platform.platform()}{_distribution()}",
        "c_library": " ".join(platform.libc_ver()).strip() or "unknown",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distribution() -> str:
    try:
        return f", {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):
        return ""


def _environment() -> Section:
    """Variables that steer pyllava and its back ends; values that look like secrets are not shown."""
    told = {
        name: "(set)" if _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if name.startswith("PYLLAVA_") or _OF_DEVICES.fullmatch(name)
    }
    return told or {"PYLLAVA_*": "(not set)"}


def _processor() -> Section:
    section: Section = {"machine": platform.machine(), "cores_of_the_machine": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        section["cores_this_process_may_use"] = len(os.sched_getaffinity(0))
    section["limits_of_control_groups"] = _limits("cpu.max", "cpu.cfs_quota_us")
    info = _file("/proc/cpuinfo")
    for key, name in (("model name", "model"), ("flags", "flags"), ("Features", "flags")):
        if found := re.search(rf"^{key}\s*:\s*(.*)$", info, re.MULTILINE):
            section[name] = found[1] if name == "model" else _flags(found[1])
    if hasattr(os, "getloadavg"):
        section["load"] = " ".join(f"{load:.2f}" for load in os.getloadavg())
    return section


def _flags(line: str) -> str:
    """Of the many flags those of vector instructions."""
    return " ".join(f for f in line.split() if re.match(r"avx|fma$|f16c|sse4|amx|asimd|i8mm|sve|bf16", f))


def _memory() -> Section:
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _file("/proc/meminfo"), re.MULTILINE))
    names = {"MemTotal": "of_the_machine", "MemAvailable": "available", "SwapTotal": "swap"}
    section: Section = {name: f"{int(info[key]) >> 10:,} MiB" for key, name in names.items() if key in info}
    section["limits_of_control_groups"] = _limits("memory.max", "memory.limit_in_bytes")
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        section["limit_of_address_space"] = (
            "none" if limit == resource.RLIM_INFINITY else f"{limit >> 20:,} MiB"
        )
    except ImportError:  # Windows
        pass
    return section


def _limits(*names: str) -> list[str] | str:
    """What the files of these names say in the control groups of this process, where they say anything."""
    found = [
        f"{folder / name}: {text}"
        for folder in _groups()
        for name in names
        if (text := _file(str(folder / name)).strip())
        and not text.startswith(("max", "-1", "9223372036854771712"))
    ]
    return found or "none"


def _groups() -> Iterator[Path]:
    """The folders of its control groups and of those above, of both versions, at their usual places."""
    for line in _file("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and not {"cpu", "memory"} & set(controllers.split(",")):
            continue
        top = Path("/sys/fs/cgroup") / controllers
        group = top / path.strip("/")
        while group.is_relative_to(top):
            yield group
            group = group.parent


def _file(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _pictures() -> Section:
    import PIL
    from PIL import features

    names = ("jpg", "zlib", "webp", "libtiff", "avif", "freetype2")
    heif = _version("pillow-heif")
    return {
        "Pillow": PIL.__version__,
        **{name: features.version(name) or "yes" if features.check(name) else "no" for name in names},
        "HEIC": f"pillow-heif {heif}" if heif else "no: pip install 'pyllava[heif]'",
    }


def _optional() -> Section:
    """What the package's extras want, and what is there of it; `test`, `dev` and the like are for its developers."""
    try:
        wanted = importlib.metadata.requires("pyllava") or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": "pyllava is not installed as a package"}
    section: Section = {}
    for text in wanted:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?([^;]*);.*extra == ['\"](\w+)['\"]", text)
        if not found or found[3] in ("test", "dev", "reference") or found[1] == "pyllava":
            continue
        name, need, extra = (part.strip() for part in found.groups())
        version = _version(name)
        section[name] = f"{version} ({need} wanted)" if version else f"no: pip install 'pyllava[{extra}]'"
    return section
