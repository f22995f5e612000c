"""Torch's zip format: what it reads, and everything it must refuse without running, allocating or crashing."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import pickled_int, pickled_tensor, pickled_text, stored, write_torch_zip, write_zip

from pyllava.convert.checkpoints.checkpoint import open_file
from pyllava.convert.checkpoints.tensor import Tensor
from pyllava.convert.errors import CheckpointError, UnsafeCheckpoint

CANARY = "canary-of-the-converters"
COMMAND = f"touch {CANARY}"
X = np.arange(24, dtype=np.float32).reshape(4, 6)


def zipped(path: Path, data: bytes, storage: bytes | None = None, prefix: str = "archive/") -> Path:
    write_zip(
        path, [(prefix + "data.pkl", data), (prefix + "data/0", X.tobytes() if storage is None else storage)]
    )
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    file, tensors = open_file(path)
    with file:
        return {name: t.rows(0, t.n_rows).reshape(t.shape) for name, t in tensors.items()}


def table(*items: tuple[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(pickled_text(name) + value for name, value in items) + b"u."


def view(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], n: int = 24, key: str = "0") -> bytes:
    return pickled_tensor(key, "f32", n, offset, shape, strides)


# What is read


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    write_torch_zip(tmp_path / "x.bin", {"a": X, "b": X[0], "c": np.float32(7).reshape(())}, dtype)
    found = read(tmp_path / "x.bin")
    np.testing.assert_array_equal(found["a"], X)
    np.testing.assert_array_equal(found["b"], X[0])
    assert found["c"].shape == ()
    assert found["c"] == 7


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "wanted"),
    [
        (0, (6, 4), (1, 6), X.T),
        (7, (2, 2), (6, 1), X[1:3, 1:3]),
        (0, (4, 3), (6, 2), X[:, ::2]),
        (5, (3, 4), (0, 6), np.broadcast_to(X[:, 5], (3, 4))),
        (0, (2, 3, 4), (12, 1, 3), X.reshape(2, 4, 3).swapaxes(1, 2)),
        (23, (1, 1), (99, 99), X[3:, 5:]),
        (0, (0, 6), (6, 1), X[:0]),
    ],
)
def test_strided_views_of_one_storage(
    tmp_path: Path, offset: int, shape, strides, wanted: np.ndarray
) -> None:
    data = table(("whole", view(0, (4, 6), (6, 1))), ("part", view(offset, shape, strides)))
    found = read(zipped(tmp_path / "x.bin", data))
    np.testing.assert_array_equal(found["part"], wanted)
    np.testing.assert_array_equal(found["whole"], X)


def test_rows_of_a_view_come_in_chunks(tmp_path: Path) -> None:
    zipped(tmp_path / "x.bin", table(("t", view(0, (6, 4), (1, 6))), ("x", view(0, (4, 6), (6, 1)))))
    file, tensors = open_file(tmp_path / "x.bin")
    with file:
        np.testing.assert_array_equal(tensors["t"].rows(2, 5), X.T[2:5])
        np.testing.assert_array_equal(tensors["x"].rows(1, 3), X[1:3])


def test_parameters_wrappers_and_attributes(tmp_path: Path) -> None:
    """nn.Parameter, OrderedDict with `_metadata`, and a table inside {"state_dict": ...}."""
    hooks = b"ccollections\nOrderedDict\n)R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + view(0, (4, 6), (6, 1)) + b"\x88" + hooks + b"tR"
    state = b"}" + pickled_text("_metadata") + hooks + b"s"
    inner = hooks + b"(" + pickled_text("w") + parameter + b"u" + state + b"b"
    data = b"\x80\x02}(" + pickled_text("epoch") + pickled_int(3) + pickled_text("state_dict") + inner + b"u."
    np.testing.assert_array_equal(read(zipped(tmp_path / "x.bin", data))["w"], X)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    """The same table in newer opcodes: short texts, STACK_GLOBAL, MEMOIZE, FRAME."""

    def short(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode() + b"\x94"

    storage = (
        short("storage") + short("torch") + short("FloatStorage") + b"\x93\x94" + short("0") + short("cpu")
    )
    body = b"}\x94" + short("x") + short("torch._utils") + short("_rebuild_tensor_v2") + b"\x93\x94"
    body += b"((" + storage + b"K\x18tQ" + b"K\x00K\x04K\x06\x86K\x06K\x01\x86\x89"
    body += short("collections") + short("OrderedDict") + b"\x93)RtRs."
    data = (
        b"\x80"
        + bytes([protocol])
        + (b"\x95" + struct.pack("<Q", len(body)) if protocol >= 4 else b"")
        + body
    )
    np.testing.assert_array_equal(read(zipped(tmp_path / "x.bin", data))["x"], X)


def test_archive_with_any_prefix_or_none(tmp_path: Path) -> None:
    for i, prefix in enumerate(("pytorch_model/", "a/b/", "")):
        path = zipped(tmp_path / f"{i}.bin", table(("x", view(0, (4, 6), (6, 1)))), prefix=prefix)
        np.testing.assert_array_equal(read(path)["x"], X)


# Hostile pickles


def call(module: str, name: str, *args: bytes) -> bytes:
    """GLOBAL module name, a tuple of arguments, REDUCE."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def alone(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def stack_global(module: str, name: str) -> bytes:
    return (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93"
    )


TEXT = pickled_text(COMMAND)
PYTHON = pickled_text(f"open({CANARY!r}, 'w')")
GOOD = view(0, (4, 6), (6, 1))
STORAGE = (
    b"("
    + pickled_text("storage")
    + b"ctorch\nFloatStorage\n"
    + pickled_text("0")
    + pickled_text("cpu")
    + b"K\x18tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"

# Would run code in Python's own unpickler, or in torch's without weights_only.
RUNNING = {
    "os.system": alone(call("os", "system", TEXT)),
    "posix.system": alone(call("posix", "system", TEXT)),
    "builtins.eval": alone(call("builtins", "eval", PYTHON)),
    "builtins.exec": alone(call("builtins", "exec", PYTHON)),
    "python 2 name": alone(call("__builtin__", "eval", PYTHON)),
    "builtins.open": alone(call("builtins", "open", pickled_text(CANARY), pickled_text("w"))),
    "stack global": b"\x80\x04" + stack_global("os", "system") + b"(" + TEXT + b"tR.",
    "stack global from memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93(" + TEXT + b"tR.",
    "memo, nothing popped": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93(" + TEXT + b"tR.",
    "inside a table": table(("x", GOOD), ("y", call("os", "system", TEXT))),
    "as a tensor's hooks": table(("x", REBUILD + b"(" + STORAGE + b"K\x00))\x89" + call("os", "system", TEXT) + b"tR")),
    "inst": b"\x80\x02(" + TEXT + b"ios\nsystem\n.",
    "obj": b"\x80\x02(cos\nsystem\n" + TEXT + b"o.",
    "protocol 0": b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.",
    "subprocess": alone(call("subprocess", "getoutput", TEXT)),
    "dotted name": b"\x80\x04" + stack_global("os", "path.os.system") + b"(" + TEXT + b"tR.",
    "partial": alone(b"cfunctools\npartial\n(cos\nsystem\n" + TEXT + b"tR)R"),
    "methodcaller": alone(
        call("operator", "methodcaller", pickled_text("system"), TEXT) + b"(" + call("importlib", "import_module", pickled_text("os")) + b"tR"
    ),
    "getattr": alone(
        call("builtins", "getattr", call("importlib", "import_module", pickled_text("os")), pickled_text("system")) + b"(" + TEXT + b"tR"
    ),
    "pickle in pickle": alone(call("pickle", "loads", b"B" + struct.pack("<I", len(alone(call("os", "system", TEXT)))) + alone(call("os", "system", TEXT)))),
}  # fmt: skip

# Other packages' loaders, opcodes and structures that no table of tensors needs.
REFUSED = {
    "torch.load": alone(call("torch", "load", pickled_text("x"))),
    "torch.hub": alone(call("torch.hub", "load", pickled_text("x"))),
    "load from bytes": alone(call("torch.storage", "_load_from_bytes", b"C\x01x")),
    "dill": alone(call("dill._dill", "_create_function", TEXT)),
    "dill type": alone(call("dill._dill", "_load_type", pickled_text("CodeType"))),
    "cloudpickle": alone(call("cloudpickle.cloudpickle", "_make_function", TEXT)),
    "numpy": alone(call("numpy.core.multiarray", "_reconstruct", TEXT)),
    "torch.device": alone(call("torch", "device", pickled_text("cpu"))),
    "newobj": alone(b"ccollections\nOrderedDict\n)\x81"),
    "newobj_ex": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "ext1": alone(b"\x82\x01"),
    "ext4": alone(b"\x84\x01\x00\x00\x00"),
    "next buffer": b"\x80\x05\x97.",
    "persid as text": alone(b"P0\n"),
    "dup": alone(b"}2"),
    "pop": alone(b"}}0"),
    "text integer": alone(b"L" + b"9" * 1_000_000 + b"L\n"),
    "long4": alone(b"\x8b\xff\xff\xff\xff"),
    "binunicode8": alone(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "binbytes8": alone(b"\x8e" + b"\xff" * 7 + b"\x7f"),
    "bytearray8": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "set": b"\x80\x04\x8f.",
    "build on a tensor": alone(GOOD + b"}b"),
    "build on a function": alone(b"ccollections\nOrderedDict\n}b"),
    "call of a storage type": alone(b"ctorch\nFloatStorage\n(K\x05tR"),
    "call of a text": alone(pickled_text("os.system") + b"(" + TEXT + b"tR"),
    "call with a list": alone(b"ccollections\nOrderedDict\n]R"),
    "ordered dict of something": alone(b"ccollections\nOrderedDict\n(]tR"),
    "storage of a function": alone(b"(" + pickled_text("storage") + b"ccollections\nOrderedDict\nX\x01\x00\x00\x000X\x00\x00\x00\x00K\x01tQ"),
    "storage by number": alone(b"(" + pickled_text("storage") + b"ctorch\nFloatStorage\nK\x00X\x00\x00\x00\x00K\x01tQ"),
    "storage of another kind": alone(STORAGE.replace(b"storage", b"storagX")),
    "storage that is a text": alone(pickled_text("storage") + b"Q"),
    "tensor of a text": alone(REBUILD + b"(" + TEXT + b"K\x00))\x89}tR"),
    "tensor of too few": alone(REBUILD + b"(" + STORAGE + b"tR"),
    "parameter of a text": alone(b"ctorch._utils\n_rebuild_parameter\n(" + TEXT + b"\x88}tR"),
    "module with NUL": alone(b"ctorch\0\nFloatStorage\n"),
    "module of objects": b"\x80\x04]]\x93.",
    "append to a dict": alone(b"}K\x01a"),
    "set item of a list": alone(b"]K\x01K\x02s"),
}  # fmt: skip

MALFORMED = {
    "empty": b"",
    "protocol only": b"\x80\x02",
    "no stop": b"\x80\x02}",
    "protocol 9": b"\x80\x09}.",
    "two objects": alone(b"}}"),
    "no object": alone(b""),
    "a mark": alone(b"("),
    "two pickles": table(("x", GOOD)) + alone(call("os", "system", TEXT)),
    "bytes after stop": table(("x", GOOD)) + b"\x00",
    "memo never kept": alone(b"h\x07"),
    "memo of nothing": alone(b"q\x00"),
    "no mark": alone(b"t"),
    "tuple of nothing": alone(b"\x87"),
    "key without value": alone(b"}(K\x01u"),
    "text too long": alone(b"X\xff\xff\xff\xff"),
    "text not utf-8": alone(b"X\x01\x00\x00\x00\xff"),
    "bytes too long": alone(b"B\xff\xff\xff\xff"),
    "long of 255 bytes": alone(b"\x8a\xff" + b"\xff" * 255),
    "global without end": b"\x80\x02cos",
    "global too long": alone(b"c" + b"a" * 100_000 + b"\nx\n"),
    "a number": alone(b"K\x01"),
    "a list": alone(b"]" + GOOD + b"a"),
    "table of numbers": table(("x", b"K\x01")),
    "deep tuples": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "deep tuple as key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "list in itself": alone(b"]q\x00h\x00a"),
    "two million opcodes": b"\x80\x02" + b"}q\x00" * 1_000_000 + b".",
    "memo index 2^32 - 1": alone(b"}r\xff\xff\xff\xffj\xff\xff\xff\xffK\x01K\x02s"),
    "stride beyond": table(("x", view(0, (4, 6), (7, 1)))),
    "size beyond": table(("x", view(0, (5, 6), (6, 1)))),
    "offset beyond": table(("x", view(1, (4, 6), (6, 1)))),
    "negative stride": table(("x", view(23, (4, 6), (-6, -1)))),
    "negative size": table(("x", view(0, (-4, -6), (6, 1)))),
    "negative offset": table(("x", view(-4, (1, 1), (6, 1)))),
    "product wraps": table(("x", view(0, (1 << 32, 1 << 32), (0, 0)))),
    "huge stride": table(("x", view(0, (2, 1), (1 << 62, 1)))),
    "strides missing": table(("x", view(0, (4, 6), (1,)))),
    "nine dimensions": table(("x", view(0, (1,) * 9, (1,) * 9))),
    "sizes are booleans": table(("x", REBUILD + b"(" + STORAGE + b"K\x00\x88\x88\x86\x88\x88\x86\x89}tR")),
    "sizes are floats": table(
        ("x", REBUILD + b"(" + STORAGE + b"K\x00G" + b"\x00" * 8 + b"\x85K\x01\x85\x89}tR")
    ),
    "conjugate": table(
        ("x", REBUILD + b"(" + STORAGE + b"K\x00))\x89}}" + pickled_text("conj") + b"\x88stR")
    ),
    "storage longer than its member": table(("x", view(0, (4, 6), (6, 1), n=25))),
    "storage shorter than its member": table(("x", view(0, (2, 6), (6, 1), n=12))),
    "storage not there": table(("x", view(0, (4, 6), (6, 1), key="1"))),
    "storage outside": table(("x", view(0, (4, 6), (6, 1), key="../../etc/passwd"))),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which a canary would appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(path: Path, here: Path, error: type[Exception] = CheckpointError) -> str:
    """The one-line reason, given within two seconds, in little memory, and with no canary."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(error) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 20  # tracing slows it tenfold
    assert peak < 256 << 20
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400
    assert not (here / CANARY).exists()
    return text


@pytest.mark.parametrize("name", RUNNING)
def test_pickles_that_would_run_code(here: Path, name: str) -> None:
    error = CheckpointError if name == "protocol 0" else UnsafeCheckpoint
    refused(zipped(here / "x.bin", RUNNING[name]), here, error)


@pytest.mark.parametrize(
    "name", [name for name in RUNNING if name not in ("as a tensor's hooks", "inside a table")]
)
def test_they_do_run_elsewhere(here: Path, name: str) -> None:
    """The payloads are live: Python's own unpickler obeys them (so the test above means something)."""
    pickle.loads(RUNNING[name])
    assert (here / CANARY).exists()


@pytest.mark.parametrize("name", REFUSED)
def test_pickles_with_foreign_parts(here: Path, name: str) -> None:
    refused(zipped(here / "x.bin", REFUSED[name]), here, UnsafeCheckpoint)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pickles(here: Path, name: str) -> None:
    refused(zipped(here / "x.bin", MALFORMED[name]), here)


def test_count_of_hostile_pickles() -> None:
    assert len(RUNNING) + len(REFUSED) + len(MALFORMED) >= 100


def test_mutated_pickles(here: Path) -> None:
    """20,000 damaged copies of a good pickle: tensors inside their storage, or a CheckpointError."""
    good = table(("a", GOOD), ("b", view(3, (2, 2), (6, 1))))
    rng = np.random.RandomState(11)
    from pyllava.convert.checkpoints import torch_pickle

    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randint(len(data))] = rng.randint(256)
        if rng.rand() < 0.2:
            del data[rng.randint(len(data)) :]
        with contextlib.suppress(CheckpointError):
            torch_pickle.load(bytes(data))
    assert not (here / CANARY).exists()


# Archives


def test_archives_with_tricks(here: Path) -> None:
    good, path = table(("x", GOOD)), here / "x.bin"
    member = ("a/data/0", X.tobytes())
    cases: dict[str, Callable[[], object]] = {
        "compressed": lambda: write_zip(path, [("a/data.pkl", good), member], zipfile.ZIP_DEFLATED),
        "appears twice": lambda: write_zip(path, [("a/data.pkl", good), member, member]),
        "leads out": lambda: write_zip(path, [("a/data.pkl", good), member, ("a/../../b", b"")]),
        "2 data.pkl": lambda: write_zip(path, [("a/data.pkl", good), member, ("b/data.pkl", good)]),
        "0 data.pkl": lambda: write_zip(path, [member]),
        "not little-endian": lambda: write_zip(path, [("a/data.pkl", good), member, ("a/byteorder", b"big")]),
        "has 95 bytes": lambda: write_zip(path, [("a/data.pkl", good), ("a/data/0", X.tobytes()[:-1])]),
        "is not in the archive": lambda: write_zip(path, [("a/data.pkl", good), ("b/data/0", X.tobytes())]),
    }
    for text, make in cases.items():
        if "twice" in text:
            with pytest.warns(UserWarning, match="Duplicate"):
                make()
        else:
            make()
        assert text in refused(path, here), text
    for name in ("/etc/passwd", "..", "a\\b"):
        write_zip(path, [("a/data.pkl", good), member, (name, b"")])
        assert "leads out" in refused(path, here)


def test_headers_that_disagree(here: Path) -> None:
    """A member's own header names another file, or its directory entry points elsewhere or past the end."""
    path = zipped(here / "x.bin", table(("x", GOOD)))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"archive/data/0", b"archive/data/1", 1))
    assert "disagrees" in refused(path, here)
    entry = data.rindex(b"PK\x01\x02")
    size = struct.unpack("<I", data[entry + 20 : entry + 24])[0]
    for n in (size * 1000, 0xFFFFFFF0):
        bad = bytearray(data)
        bad[entry + 20 : entry + 28] = struct.pack("<II", n, n)
        path.write_bytes(bad)
        refused(path, here)


def test_damaged_archives(here: Path) -> None:
    """Cut at every byte and flipped at every byte: the right numbers or a CheckpointError."""
    path = zipped(here / "x.bin", table(("x", GOOD)))
    data = path.read_bytes()
    for i in itertools.chain(range(0, len(data), 3)):
        path.write_bytes(data[:i])
        with pytest.raises(CheckpointError):
            read(path)
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :])
        try:
            found = read(path)
        except CheckpointError:
            continue
        assert all(array.size <= 24 for array in found.values())
    assert not (here / CANARY).exists()


def test_old_formats_are_refused_with_advice(here: Path) -> None:
    path = here / "x.bin"
    cases = {
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"x" * 100: "old format",
        pickle.dumps({"a": 1}, protocol=2): "old format",
        b"./" + b"\0" * 600: "tar file",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "Git LFS pointer",
        b"<!DOCTYPE html><html>": "HTML page",
        b"GGUF\x03\x00\x00\x00": "GGUF file",
        b"": "empty",
        b"abc": "at least 8",
    }
    for data, text in cases.items():
        path.write_bytes(data)
        assert text in refused(path, here)


def test_rows_too_long_to_hold(tmp_path: Path) -> None:
    """An expanded view may claim rows of any length; they are refused when asked for."""
    path = zipped(tmp_path / "x.bin", table(("x", view(0, (1, 1 << 40), (0, 0)))))
    file, tensors = open_file(path)
    with file, pytest.raises(CheckpointError, match="too long"):
        tensors["x"].rows(0, 1)


def test_integers_are_listed_but_are_no_weights(tmp_path: Path) -> None:
    data = table(("x", GOOD.replace(b"FloatStorage", b"LongStorage")))
    path = zipped(tmp_path / "x.bin", data, np.arange(24, dtype="<i8").tobytes())
    file, tensors = open_file(path)
    with file:
        assert tensors["x"].dtype == "i64"
        np.testing.assert_array_equal(tensors["x"].stored_rows(1, 2), [np.arange(6, 12)])
        with pytest.raises(CheckpointError, match="type i64"):
            tensors["x"].rows(0, 1)


def test_stored_sizes_agree_with_the_tests_writer(tmp_path: Path) -> None:
    write_torch_zip(tmp_path / "x.bin", {"a": X}, "bf16")
    file, tensors = open_file(tmp_path / "x.bin")
    with file:
        tensor: Tensor = tensors["a"]
        assert tensor.stored_rows(0, 4).tobytes() == stored(X, "bf16")
