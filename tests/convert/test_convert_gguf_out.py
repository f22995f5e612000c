"""Writing: streamed, checked before it appears under its name, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, read_gguf
from tiny import TinySpec, write_llava_checkpoint, write_tensors

from pyllava import _part_file
from pyllava.convert import gguf_out
from pyllava.convert.checkpoints import tensor
from pyllava.convert.checkpoints.checkpoint import Checkpoint
from pyllava.convert.errors import CheckpointError, OutputError
from pyllava.convert.gguf_out import Metadata, OutTensor, check_gguf, write_gguf, written
from pyllava.formats import BF16, F16, F32, Q8_0, GgmlType

RNG = np.random.RandomState(0)
X = RNG.standard_normal((37, 64)).astype(np.float32)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Checkpoint]:
    write_tensors(tmp_path / "in.safetensors", {"x": X, "y": X[0], "z": X.reshape(37, 4, 4, 4)}, "f32")
    with Checkpoint([tmp_path / "in.safetensors"]) as checkpoint:
        yield checkpoint


def meta() -> Metadata:
    out = Metadata("llama")
    out.text("general.name", "n\u00e4me")
    out.f32s("a.floats", [0.1, 2.0])
    out.i32s("a.ints", [-1, 2])
    out.texts("a.texts", ["", "\u2581x"])
    out.i32s("a.none", [])
    out.flag("a.flag", False)
    return out


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [64, 200, 1 << 20])
def test_chunks_of_any_size_give_the_same_file(
    tmp_path: Path, sources: Checkpoint, kind: GgmlType, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    monkeypatch.setattr(tensor, "CHUNK_ELEMENTS", chunk)
    shape = sources["z"].shape
    tensors = [
        OutTensor("x", sources["x"], (37, 64), kind),
        OutTensor("y", sources["y"], (64,), F32),
        OutTensor("z", sources["z"], shape, F16),
        OutTensor("w", sources["x"], (37, 64), F16, lambda rows: rows[::-1] * 2, 37),
    ]
    write_gguf(tmp_path / "out.gguf", meta(), tensors, inputs=sources.files)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")  # the package's own, all at once
    for key, (value_type, element, value) in meta().values.items():
        writer.add_key_value(key, value, value_type, sub_type=element)
    quantised = gguf.quants.quantize(X, gguf.GGMLQuantizationType(kind.id))
    writer.add_tensor("x", quantised, raw_dtype=gguf.GGMLQuantizationType(kind.id))
    writer.add_tensor("y", X[0])
    writer.add_tensor("z", X.reshape(shape).astype(np.float16))
    writer.add_tensor("w", (X[::-1] * 2).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    file = read_gguf(tmp_path / "out.gguf")
    assert file.kv["a.texts"] == ["", "\u2581x"]
    assert "a.none" not in file.kv


def test_every_changed_byte_of_a_tensor_is_noticed(tmp_path: Path, sources: Checkpoint) -> None:
    path, tensors = tmp_path / "out.gguf", [OutTensor("y", sources["y"], (64,), F32)]
    write_gguf(path, meta(), tensors, inputs=[])
    data = path.read_bytes()
    check_gguf(path, meta(), tensors)
    for i in range(len(data) - 256, len(data), 17):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(OutputError, match="beyond the rounding"):
            check_gguf(path, meta(), tensors)
    path.write_bytes(data)
    other = meta()
    other.text("general.name", "other")
    with pytest.raises(OutputError, match=r"general\.name reads back differently"):
        check_gguf(path, other, tensors)
    other.u32("more", 1)
    with pytest.raises(OutputError, match="missing or extra"):
        check_gguf(path, other, tensors)
    with pytest.raises(OutputError, match="holds 1 tensors"):
        check_gguf(path, meta(), [])
    with pytest.raises(OutputError, match="reads back as F32"):
        check_gguf(path, meta(), [OutTensor("y", sources["y"], (64,), F16)])


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ([("n" * 64, (37, 64), F32)], "at most 63"),
        ([("", (37, 64), F32)], "at most 63"),
        ([("x", (37, 64), F32), ("x", (37, 64), F32)], "unique"),
        ([("x", (37, 63), F32)], "cannot be written as"),
        ([("x", (64, 37), Q8_0)], "do not divide"),
    ],
)
def test_bad_plans(tmp_path: Path, sources: Checkpoint, plan: list[Any], text: str) -> None:
    tensors = [OutTensor(name, sources["x"], shape, kind) for name, shape, kind in plan]
    with pytest.raises(OutputError, match=text):
        write_gguf(tmp_path / "out.gguf", meta(), tensors, inputs=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


def nothing_but_the_input(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == ["in.safetensors"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, sources: Checkpoint, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read of a source fails once, in writing and in checking."""
    tensors = [OutTensor("x", sources["x"], (37, 64), F16), OutTensor("y", sources["y"], (64,), F32)]
    real = tensor.Tensor.rows
    monkeypatch.setattr(tensor, "CHUNK_ELEMENTS", 640)
    for nth in range(100):
        calls = iter(range(1000))

        def rows(self: tensor.Tensor, start: int, stop: int, nth: int = nth, calls: Any = calls) -> Any:
            if next(calls) == nth:
                raise error
            return real(self, start, stop)

        monkeypatch.setattr(tensor.Tensor, "rows", rows)
        try:
            write_gguf(tmp_path / "out.gguf", meta(), tensors, inputs=[])
        except type(error):
            assert nothing_but_the_input(tmp_path)
        else:
            break
    assert nth == 2 * (4 + 1)
    assert (tmp_path / "out.gguf").exists()


def test_wrong_bytes_on_disk_never_get_the_name(
    tmp_path: Path, sources: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.gguf").write_bytes(b"the old file")
    real = gguf_out.encode
    monkeypatch.setattr(gguf_out, "encode", lambda x, kind: real(x * 1.01, kind))
    with pytest.raises(OutputError, match="beyond the rounding"):
        write_gguf(tmp_path / "out.gguf", meta(), [OutTensor("x", sources["x"], (37, 64), F16)], inputs=[])
    assert (tmp_path / "out.gguf").read_bytes() == b"the old file"
    assert not (tmp_path / "out.gguf.part").exists()


def test_full_disk_is_seen_before_writing(
    tmp_path: Path, sources: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr(_part_file.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=r"needs 16\.8 MB, .* has 1\.0 MB free"):
        write_gguf(tmp_path / "out.gguf", meta(), [OutTensor("x", sources["x"], (37, 64), F16)], inputs=[])
    assert nothing_but_the_input(tmp_path)


def test_targets_that_are_refused(tmp_path: Path, sources: Checkpoint) -> None:
    tensors = [OutTensor("x", sources["x"], (37, 64), F16)]
    (tmp_path / "folder").mkdir()
    for target, text in (
        (tmp_path / "folder", "not a regular file"),
        (Path("/dev/full"), "not a regular file"),
        (tmp_path / "nowhere" / "out.gguf", "no such folder"),
        (tmp_path / "in.safetensors", "both input and output"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            write_gguf(target, meta(), tensors, inputs=sources.files)
    part = tmp_path / "out.gguf.part"
    os.link(tmp_path / "in.safetensors", part)
    with pytest.raises(ValueError, match=r"out\.gguf\.part: is an input"):
        write_gguf(tmp_path / "out.gguf", meta(), tensors, inputs=[part])
    assert part.exists()


def test_the_unfinished_file_of_another_program_gets_no_name(tmp_path: Path, sources: Checkpoint) -> None:
    tensors = [OutTensor("x", sources["x"], (37, 64), F16)]

    def other_begins(part: Path) -> None:
        part.unlink()
        part.write_bytes(b"half")

    with (
        pytest.raises(FileExistsError, match="another program"),
        written(tmp_path / "out.gguf", meta(), tensors, inputs=[]) as part,
    ):
        other_begins(part)
    assert part.read_bytes() == b"half"
    assert not (tmp_path / "out.gguf").exists()


def test_a_read_that_fails_names_the_input(tmp_path: Path, sources: Checkpoint) -> None:
    class Broken(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    sources["x"].file._file = Broken()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"in\.safetensors'$"):
        write_gguf(tmp_path / "out.gguf", meta(), [OutTensor("x", sources["x"], (37, 64), F16)], inputs=[])


def test_part_file_of_a_killed_run_is_replaced(tmp_path: Path, sources: Checkpoint) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "out.gguf.part").symlink_to(tmp_path / "victim")
    write_gguf(tmp_path / "out.gguf", meta(), [OutTensor("x", sources["x"], (37, 64), F16)], inputs=[])
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "out.gguf").is_symlink()
    assert not (tmp_path / "out.gguf.part").exists()


# Whole runs of a script


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from pyllava.convert.convert_legacy_llama import main
raise SystemExit(main([{model!r}, "--skip-unknown"]))
"""


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 100_000, 250_000])
def test_writes_that_fail(tmp_path: Path, limit: int) -> None:
    """The system refuses to let the file grow beyond `limit` bytes (as a full disk does)."""
    pytest.importorskip("resource")
    write_llava_checkpoint(tmp_path, TinySpec())
    before = sorted(tmp_path.iterdir())
    code = LIMITED.format(root=str(ROOT), limit=limit, model=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.endswith(f"error: {tmp_path}/ggml-model-f16.gguf: File too large\n")
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from pyllava.convert.checkpoints import tensor
real = tensor.Tensor.rows
def rows(self, start, stop):
    time.sleep(0.02)
    return real(self, start, stop)
tensor.Tensor.rows = rows
from pyllava.convert.convert_legacy_llama import main
print("ready", file=sys.stderr, flush=True)
raise SystemExit(main([{model!r}, "--skip-unknown"]))
"""


@pytest.mark.parametrize("which", ["interrupt", "kill"])
def test_signals_at_many_moments(tmp_path: Path, which: str) -> None:
    """Ctrl-C ends with 130 and leaves nothing; after kill -9 the final name holds nothing or the whole file."""
    folder = write_llava_checkpoint(tmp_path, TinySpec(n_layer=3))
    code = SLOW.format(root=str(ROOT), model=str(folder))
    target = folder / "ggml-model-f16.gguf"
    n_stopped = 0
    for i in range(6):
        target.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.2 + 0.2 * i)
        process.send_signal(signal.SIGINT if which == "interrupt" else signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0 or "read back and compared" in errors:
            continue  # done; what is left is the interpreter's own end
        n_stopped += 1
        assert process.returncode == (130 if which == "interrupt" else -signal.SIGKILL), errors
        assert "Traceback" not in errors
        if target.exists():
            assert len(read_gguf(target).tensors) == 30
        if which == "interrupt":
            assert errors.splitlines()[-1].endswith("interrupted")
            assert not list(folder.glob("*.part"))
    assert n_stopped >= 2
    target.unlink(missing_ok=True)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    assert not list(folder.glob("*.part"))
    assert os.path.getsize(target) > 100_000


def test_numbers_beyond_f16_name_the_way_out(tmp_path: Path) -> None:
    write_tensors(tmp_path / "in.safetensors", {"x": X * 1e6}, "f32")
    with Checkpoint([tmp_path / "in.safetensors"]) as checkpoint:
        with pytest.raises(CheckpointError, match="does not fit f16, use f32 for this file"):
            write_gguf(tmp_path / "o", meta(), [OutTensor("x", checkpoint["x"], (37, 64), F16)], inputs=[])
        write_gguf(tmp_path / "o", meta(), [OutTensor("x", checkpoint["x"], (37, 64), BF16)], inputs=[])
