"""``pyllava-cli doctor``: a page about this installation, above all where it does not work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_plugins import install

import pyllava
from pyllava import _doctor, _doctor_probe, _lib, cli

ROOT = Path(__file__).parent.parent
ELSEWHERE = ["versions", "environment", "processor", "memory", "pictures", "optional_packages"]
OF_THE_LIBRARY = [*_doctor_probe.NAMES]
USUAL = _doctor_probe.command
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def page(capsys: Capture, *, code: int) -> tuple[dict[str, Any], str]:
    """The page as JSON, and stderr."""
    assert cli.main(["doctor", "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out), err


def in_the_child(monkeypatch: Patch, code: str) -> None:
    """Runs `code` in the child before the library's part, or in its place."""
    usual = USUAL()
    command = [*usual[:2], usual[2].replace("_doctor_probe.probe()", code)]
    monkeypatch.setattr(_doctor_probe, "command", lambda: command)


def test_a_sound_installation(capsys: Capture) -> None:
    found, err = page(capsys, code=0)
    assert not err
    assert list(found) == [*ELSEWHERE, *OF_THE_LIBRARY]
    assert found["versions"]["pyllava"].startswith(pyllava.__version__)
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert found["library"]["abi"] == _lib.ABI
    assert found["library"]["path"].endswith(Path(_lib.lib._name).name)
    assert [device["name"] for device in found["devices"]["devices"]] == [d.name for d in _lib.devices()]
    assert [answer["answer"] for answer in found["self_test"]["answers"]][1:] == ["2", "Red"]
    assert found["self_test"]["is_right"]
    assert found["pictures"]["jpg"] != "no"


def test_the_page_as_text(capsys: Capture) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == _doctor.PRIVACY
    assert [line for line in lines[1:] if line and line[0] != " "] == [
        name.replace("_", " ") for name in (*ELSEWHERE, *OF_THE_LIBRARY)
    ]
    assert any(
        re.fullmatch(r"    question: .*, answer: Red, ms: [\d.]+, is right: yes", line) for line in lines
    )


@pytest.mark.parametrize(
    ("contents", "words"),
    [(None, "ImportError: libpyllava is not built: looked in "), (b"no library", "ImportError: ")],
)
def test_a_library_that_cannot_be_loaded(
    contents: bytes | None, words: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Everything else is printed, and why it cannot."""
    path = tmp_path / "libpyllava.so"
    if contents is not None:
        path.write_bytes(contents)
    monkeypatch.setenv("PYLLAVA_LIBRARY", str(path))
    found, err = page(capsys, code=1)
    assert list(found) == [*ELSEWHERE, "library"]
    assert found["library"]["error"].startswith(words)
    assert str(path.parent) in found["library"]["error"]
    assert found["environment"]["PYLLAVA_LIBRARY"] == str(path)
    assert found["versions"]["python"].endswith(sys.executable)
    assert err == f"pyllava-cli: error: library: {found['library']['error']}\n"


def test_without_the_library_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The command itself loads it nowhere, from whichever folder it is started."""
    environment = {**os.environ, "PYLLAVA_LIBRARY": "/nowhere/libpyllava.so"}
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pyllava import cli; ",
    ]
    command[-1] += "raise SystemExit(cli.main(['doctor']))"
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "\npictures\n" in ran.stdout
    assert "\nlibrary\n  error: ImportError: libpyllava is not built: looked in /nowhere" in ran.stdout


@pytest.mark.parametrize(
    ("module", "words"), [("numpy", "import of numpy halted"), ("PIL", "import of PIL halted")]
)
def test_a_package_that_is_missing(module: str, words: str, monkeypatch: Patch, capsys: Capture) -> None:
    in_the_child(monkeypatch, f"sys.modules[{module!r}] = None; _doctor_probe.probe()")
    found, _ = page(capsys, code=1)
    section = "library" if module == "numpy" else "self_test"
    assert words in found[section]["error"]


def test_back_ends_of_packages_and_why_they_are_not_used(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    install(tmp_path, "llava_gpu", {"libggml-gpu.so": b"no library"})
    install(tmp_path, "llava_none", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    section = page(capsys, code=0)[0]["devices"]
    found = section["packages_with_back_ends"]
    assert sorted(found) == ["llava_gpu 1.0: libggml-gpu.so", "llava_none 1.0: it holds no back end"]
    told = sorted(section["not_used"])
    assert told[0].startswith("llava_gpu 1.0 is not used: ")
    assert told[1] == "llava_none 1.0 is not used: it holds no back end"
    monkeypatch.setenv("PYLLAVA_PLUGINS", "0")
    section = page(capsys, code=0)[0]["devices"]
    assert section["packages_with_back_ends"] == "not looked for: PYLLAVA_PLUGINS=0"
    assert not section["not_used"]


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
def test_without_a_python_to_start(executable: str, monkeypatch: Patch) -> None:
    """In a program that an interpreter was built into, and where no process can be started."""
    monkeypatch.setattr(sys, "executable", executable)
    found = _doctor.report()
    assert _doctor.is_sound(found) == (not executable)
    if executable:
        assert found["library"]["error"] == "not looked at: /nowhere/python: No such file or directory"


def test_a_process_that_crashes_keeps_what_was_found(monkeypatch: Patch, capsys: Capture) -> None:
    """As a library does that was built for another CPU."""
    crash = "import os, signal; _doctor_probe._instructions = lambda: os.kill(os.getpid(), signal.SIGILL)"
    in_the_child(monkeypatch, f"{crash}; _doctor_probe.probe()")
    found, err = page(capsys, code=1)
    assert list(found) == [*ELSEWHERE, "library", "devices", "instructions"]
    words = "the process was ended by SIGILL: the library was built for another CPU; build it on this machine"
    assert found["instructions"] == {"error": words}
    assert f"instructions: {words}" in err


def test_a_process_that_dies_early_or_never_ends(monkeypatch: Patch, capsys: Capture) -> None:
    in_the_child(monkeypatch, "print('last\\x1b', file=sys.stderr); raise SystemExit(7)")
    section = page(capsys, code=1)[0]["library"]
    assert section == {"error": "the process ended with exit code 7", "its_last_words": ["last?"]}
    late = subprocess.TimeoutExpired(
        "python", 120.0, output=b'{"library": {"abi": 7}}\n5\n{"cut', stderr=None
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(late))
    found = page(capsys, code=1)[0]
    assert found["library"] == {"abi": 7}
    assert found["devices"] == {"error": "it did not end within 120 s"}


def test_an_answer_that_is_wrong(monkeypatch: Patch, capsys: Capture) -> None:
    in_the_child(
        monkeypatch,
        "_doctor_probe._QUESTIONS['How many shapes are there?'] = '3'; _doctor_probe.probe()",
    )
    section = page(capsys, code=1)[0]["self_test"]
    assert not section["is_right"]
    assert section["error"].startswith("1 of 3 answers are wrong")
    assert [answer["is_right"] for answer in section["answers"]] == [True, False, True]


def test_instruction_sets_are_those_of_the_library_in_its_order() -> None:
    """As cpu.c has them: x86 first, then Arm, then none."""
    source = (ROOT / "ggml" / "kernels" / "cpu.c").read_text()
    assert tuple(re.findall(r"\{ &micro_(\w+), has", source)) == _doctor_probe._SETS
    micro = (ROOT / "ggml" / "kernels").glob("micro_*.c")
    assert {path.stem.removeprefix("micro_") for path in micro} >= set(_doctor_probe._SETS)


def test_the_instruction_set_that_is_chosen_and_why(monkeypatch: Patch) -> None:
    monkeypatch.delenv("PYLLAVA_CPU", raising=False)
    section = _doctor_probe._instructions()
    best = section["run_here"].split()[0]
    key = "products_and_attention_of_the_fast_mode"
    assert section["run_here"].split()[-1] == "plain"
    assert (section[key], section["because"]) == (best, "it is the best that runs here")
    monkeypatch.setenv("PYLLAVA_CPU", "plain")
    section = _doctor_probe._instructions()
    assert (section[key], section["because"]) == ("plain", "PYLLAVA_CPU names it")
    assert os.environ["PYLLAVA_CPU"] == "plain"
    monkeypatch.setenv("PYLLAVA_CPU", "sse9")
    section = _doctor_probe._instructions()
    assert (section[key], section["because"]) == ("none", "PYLLAVA_CPU=sse9 is not among them")


def test_nothing_private_is_on_the_page(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PYLLAVA_MODELS", "/home/somebody/models:/home/somebody-else:/mnt/home/somebody")
    monkeypatch.setenv("PYLLAVA_API_KEY", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter3")
    monkeypatch.setattr(_doctor, "_of_library", dict)
    text = json.dumps(_doctor.report())
    assert "~/models:/home/somebody-else:/mnt/home/somebody" in text
    assert "hunter" not in text
    assert json.loads(text)["environment"]["PYLLAVA_API_KEY"] == "(set)"


def test_what_a_variable_holds_cannot_steer_a_terminal(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("PYLLAVA_NOTE", "a\x1b[31mb\nc")
    monkeypatch.setattr(_doctor, "_of_library", dict)
    assert cli.main(["doctor"]) == 1  # nothing is known of the library
    out = capsys.readouterr().out
    assert "  PYLLAVA_NOTE=a?[31mb?c\n" in out


def test_limits_of_control_groups(monkeypatch: Patch) -> None:
    """Of version 2, of version 1, and of the groups above."""
    files = {
        "/proc/self/cgroup": "4:cpu,cpuacct:/old\n7:freezer:/cold\n0::/a/b\n",
        "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "/sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_quota_us": "50000\n",
        "/sys/fs/cgroup/memory.max": "1073741824\n",
    }
    monkeypatch.setattr(_doctor, "_file", lambda path: files.get(path, ""))
    cpu = [
        "/sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_quota_us: 50000",
        "/sys/fs/cgroup/a/cpu.max: 150000 100000",
    ]
    assert _doctor._limits("cpu.max", "cpu.cfs_quota_us") == cpu
    assert _doctor._limits("memory.max") == ["/sys/fs/cgroup/memory.max: 1073741824"]
    assert _doctor._limits("no.such") == "none"


def test_a_section_that_fails_costs_no_other(monkeypatch: Patch, capsys: Capture) -> None:
    def failing() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_doctor, "_memory", failing)
    found, err = page(capsys, code=0)
    assert found["memory"] == {"error": "OSError: Input/output error"}
    assert found["self_test"]["is_right"]
    assert err == "pyllava-cli: error: memory: OSError: Input/output error\n"


def test_optional_packages_are_those_of_the_extras() -> None:
    section = _doctor._optional()
    if list(section) == ["unknown"]:
        pytest.skip("pyllava is not installed as a package")
    assert "gguf" in section
    assert not {"pytest", "ruff", "torch", "pyllava"} & set(section)


@pytest.mark.parametrize("command", [["bench"], ["caption"], []])
def test_devices_as_json(command: list[str], capsys: Capture) -> None:
    argv = [*command, "--list-devices", *(["--json"] if command else [])]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    if command:
        assert [device["name"] for device in json.loads(out)] == [d.name for d in _lib.devices()]
    else:
        assert out.startswith("CPU: ")


def test_the_counts_of_captions_as_json(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.png").write_bytes((ROOT / "examples" / "scene.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"no picture")
    argv = ["caption", str(tmp_path), "-o", str(tmp_path / "rows.jsonl"), "-n", "4", "--json"]
    assert cli.main(argv) == 1
    counts = json.loads(capsys.readouterr().out)
    assert counts.pop("seconds") > 0
    assert counts == {"captions": 1, "failed": 1, "left": 0, "done_before": 0, "skipped": 0}
    assert cli.main(["caption", str(tmp_path), "-o", "-", "--json"]) == 2
    assert "--json: the rows of -o - take stdout" in capsys.readouterr().err
