"""The parts of bench/gpu that need no GPU: the report of checks that fail, hang or do not fit, and what they read."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench")]
import check  # noqa: E402
import compare  # noqa: E402
import kit  # noqa: E402
import measure  # noqa: E402
from kit import Check, Failed, Found, Output, Report  # noqa: E402


def python(name: str, code: str, seconds: float = 20, **more: bool) -> Check:
    return Check(name, [sys.executable, "-c", code], seconds, kit.json_line, **more)


def report(path: Path, seconds: float = 60) -> Report:
    return Report(path / "report.json", seconds, {}, {"device": "CPU"})


def test_a_check_that_fails_or_hangs_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        python("good", "print('noise'); print('{\"x\": 2}')"),
        python("raises", "raise ValueError('so it is')"),
        python("crashes", "import os; os.kill(os.getpid(), 11)"),
        python("hangs", "import time; print('begun', flush=True); time.sleep(60)", 1),
        python("says nothing", "pass"),
        Check("is not there", ["/nowhere/program"], 5, kit.json_line),
        python("good again", "print('{}')"),
    ]
    made = report(tmp_path)
    lines = [made.run(one) for one in checks]
    assert [line.status for line in lines] == ["ok", "failed", "failed", "timeout", "failed", "failed", "ok"]
    assert lines[0].numbers["x"] == 2
    assert lines[1].detail == "exit status 1: ValueError: so it is"
    assert "SIGSEGV" in lines[2].detail
    assert "begun" in lines[3].output
    assert made.close() == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["device"] == "CPU"
    assert [line["name"] for line in written["checks"]] == [one.name for one in checks]
    shown = capsys.readouterr().out
    assert "hangs" in shown
    assert "2 ok, 4 failed, 1 timeout" in shown


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    made = report(tmp_path, kit.LEAST - 1)
    line = made.run(python("late", "print('{}')"))
    assert (line.status, line.detail) == ("skipped", "no time left")


def test_without_what_is_needed_the_rest_is_skipped(tmp_path: Path) -> None:
    made = report(tmp_path)
    made.run(python("build", "raise SystemExit(3)", needed=True))
    line = made.run(python("more", "print('{}')"))
    assert (line.status, line.detail) == ("skipped", "after: build")


def test_a_child_of_a_check_ends_with_it(tmp_path: Path) -> None:
    left = tmp_path / "left"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(left)!r}).touch()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); import time; time.sleep(60)"
    assert report(tmp_path).run(python("parent", code, 1)).status == "timeout"
    time.sleep(2)
    assert not left.exists()


@pytest.mark.parametrize(
    ("status", "out", "text"),
    [
        (0, "...\n3 passed in 0.1s", "3 passed"),
        (0, "s\n1 skipped in 0.1s", None),
        (1, "FAILED tests/a.py::test_b[c] - x\n1 failed, 2 passed in 3s", "1 failed, 2 passed: test_b[c]"),
        (4, "ERROR: not found: a.py\n", "exit status 4"),
    ],
)
def test_pytest_is_read(status: int, out: str, text: str | None) -> None:
    output = Output(status, out, "", 1.0)
    if status == 0 and text:
        assert kit.tests(output).detail == text
        return
    with pytest.raises(Failed, match=None if text is None else text.replace("[", r"\[")):
        kit.tests(output)


def test_every_device_test_is_in_a_group() -> None:
    tree = ast.parse((ROOT / "tests" / "test_devices.py").read_text())
    marked = {
        f.name
        for f in tree.body
        if isinstance(f, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id.startswith("on_") for d in f.decorator_list)
    }
    grouped = [test for tests, _ in check.TESTS.values() for test in tests]
    assert sorted(grouped) == sorted(marked)


def test_a_device_that_is_not_there_is_named() -> None:
    listed = Output(0, "CPU: a processor (10 MiB, 5 MiB free)\n", "no driver\n", 1.0)
    assert kit.named(listed, "CPU") == Found(listed.out.strip(), {"device": listed.out.strip()})
    with pytest.raises(Failed, match="no CUDA0 here, but CPU: no driver"):
        kit.named(listed, "CUDA0")


def test_the_table_of_measurements() -> None:
    table = measure.Table({"7b f16": {"decode_tok_s": 10.0, "encode_s": 2.0}}, {"7b f16": {"encode_s": 4.0}})
    rows = list(table.rows({"7b f16": Path("unused")}, reached=False))
    assert rows[2:] == [
        "| 7b f16 | decode_tok_s | 10 | - | not measured | - |",
        "| 7b f16 | encode_s | 2 | - | 4 | 2.00 |",
    ]


def test_numbers_of_a_bench_run() -> None:
    out = json.dumps({"load_s": 1, "prefill_tok_s": 5, "decode_batch_tok_s": {"8": 7}, "decode_tok_s": 3})
    read = measure.speed()(Output(0, out, "", 1.0)).numbers
    assert read == {"prefill_tok_s": 5, "decode_tok_s": 3, "decode_8_tok_s": 7}
    assert measure.speed("prefill_2928_tok_s")(Output(0, out, "", 1.0)).numbers == {"prefill_2928_tok_s": 5}


def test_the_pin_is_found() -> None:
    assert len(kit.pinned_ggml()) == 64
    assert kit.library_of(Path("w")).name.startswith("libpyllava")
    assert kit.parser(None, 9).parse_args([]).seconds == 9


def test_what_is_reached_of_the_limits() -> None:
    machine = {"read_gb_s": 10.0, "int8_gops": 1000.0, "bf16_gflops": 500.0}
    ours = {"decode_tok_s": 100.0, "decode_8_tok_s": 400.0, "prefill_512_tok_s": 50.0, "encode_5_s": 2.0}
    q8_0 = ROOT / "pyllava" / "models" / "demo-q8_0.gguf"
    found = compare.fractions(ours, machine, q8_0)
    size = q8_0.stat().st_size / 1e9
    matrices = sum(n for n, _ in compare.matrices_of(q8_0)) / 1e9
    assert found["decode_tok_s"] == (pytest.approx(100 * size), 10.0, "GB/s")
    assert found["decode_8_tok_s"] == (pytest.approx(50 * size), 10.0, "GB/s")
    assert found["prefill_512_tok_s"] == (pytest.approx(100 * matrices), 1000.0, "int8 GOP/s")
    assert found["encode_5_s"][1:] == (500.0, "16-bit GOP/s")
    f16 = ROOT / "tests" / "data" / "demo" / "demo-f16.gguf"
    assert compare.fractions(ours, machine, f16)["prefill_512_tok_s"][1] == 500.0
    assert compare.fractions(ours, {}, f16) == {}
